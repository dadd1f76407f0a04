"""`pipermoe dryrun`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pipermoe.cli.options import ModelName, Switch, training_job
from pipermoe.cli.output import show
from pipermoe.specs.errors import UserError

if TYPE_CHECKING:
    from pipermoe.specs.configuration import Configuration


def dryrun(
    *,
    rank: int,
    plan: Path | None = None,
    model: ModelName | None = None,
    strategy: str | None = None,
    world_size: Annotated[int | None, Parameter(name=["--world-size", "--ranks", "--gpus"])] = None,
    job: Path | None = None,
    seq_len: int | None = None,
    global_batch: int | None = None,
    routing: str = "balanced",
    seed: int = 0,
    json: Switch = False,
) -> None:
    """Execute one rank of a job of any size without memory or network: exact bytes, FLOPs and traffic.

    Parameters
    ----------
    rank
        Which rank of the job.
    plan
        The plan file (see `pipermoe plan`); or give --model and --strategy.
    strategy
        A strategy file (TOML), or a line such as "pp8 dp32 ep32 mbs1 1f1b z1".
    world_size
        Ranks of the job, to check the strategy against.
    job
        The training job (TOML). Without it: bf16, and what the next two options say.
    seq_len
        Tokens in a sequence. Default: 4096.
    global_batch
        Sequences in a step. Default: two micro-batches for every pipeline stage.
    routing
        Rows by expert: balanced, lognormal:max=1.5, lognormal:sigma=0.5, or a JSON file of counts or shares.
    seed
        Draws the log-normal loads.
    json
        Print as JSON, action by action.
    """
    from pipermoe.dryrun.dry_run import dry_run
    from pipermoe.report.footprint import render_footprint
    from pipermoe.specs.documents import load
    from pipermoe.specs.plan import Plan

    if plan is not None:
        if any(option is not None for option in (model, strategy, job, seq_len, global_batch)):
            raise UserError("--plan brings model, strategy and job; leave their options out")
        what = load(plan, Plan)
    elif model is not None and strategy is not None:
        what = _described(model, strategy, job, seq_len, global_batch)
    else:
        raise UserError("give --plan, or --model and --strategy")
    asked = {"rank": rank, "world_size": world_size, "routing": routing, "seed": seed}
    footprint = dry_run(what.model, what.train, what.strategy, **asked)
    show(footprint, lambda console: render_footprint(footprint, console), as_json=json)


def _described(
    model: str, strategy: str, job: Path | None, seq_len: int | None, global_batch: int | None
) -> Configuration:
    from pipermoe.specs.catalogue import load_model
    from pipermoe.specs.configuration import Configuration
    from pipermoe.specs.strategy_text import read_strategy

    arranged = read_strategy(strategy)
    batch = 2 * arranged.num_stages * arranged.data_parallel * arranged.micro_batch_size
    defaults = {} if job else {"seq_len": 4096, "global_batch_size": batch, "precision": "bf16"}
    task = training_job(job, seq_len, global_batch, defaults=defaults)
    return Configuration(model=load_model(model), train=task, strategy=arranged)

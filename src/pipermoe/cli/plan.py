"""`pipermoe plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from pipermoe import __version__
from pipermoe.cli.options import Output, Switch, memory_bytes, number_of_ranks, training_job
from pipermoe.cli.output import note, show


def plan(
    model: str,
    *,
    platform: str,
    job: Path | None = None,
    ranks: Annotated[int | None, Parameter(name=["--ranks", "--gpus"])] = None,
    nodes: int | None = None,
    seq_len: int | None = None,
    global_batch: int | None = None,
    precision: str | None = None,
    memory: str | None = None,
    imbalance: float = 1.0,
    objective: Literal["step-time", "memory"] = "step-time",
    top: int = 8,
    output: Output = Path("plan.toml"),
    json: Switch = False,
) -> None:
    """Find the fastest strategy that fits, and say why it won.

    Parameters
    ----------
    model
        A catalogue name, a model file (TOML), a Hugging Face config.json or its folder.
    platform
        A machine of the catalogue (docs/platforms.md) or a platform file (pipermoe measure).
    job
        The training job (TOML): batch, sequence, optimizer, data. Options below override it.
    ranks
        Number of ranks. Default: the ranks of one of the platform's hosts.
    nodes
        Number of hosts instead, all of their ranks.
    seq_len
        Tokens in a sequence.
    global_batch
        Sequences in a step.
    precision
        fp32, bf16, fp16 or fp8. Default without a job: bf16 where the device is faster in it than in fp32.
    memory
        Memory budget of one rank, for example 80GiB. Default: the platform's.
    imbalance
        Rows of the busiest rank over the mean; 1 is balanced routing.
    objective
        The fastest step, or the most memory to spare among strategies at most 5 % slower.
    top
        Rows in the ranked table.
    output
        The plan file to write (TOML): what `pipermoe train` runs.
    json
        Print the ranking and the explanation as JSON.
    """
    from pipermoe.planner import find_plan
    from pipermoe.report.plan import render_planning
    from pipermoe.specs.catalogue import load_model
    from pipermoe.specs.documents import require_writable, save
    from pipermoe.specs.platform_file import load_platform

    require_writable(output)
    machine = load_platform(platform)
    planning = find_plan(
        load_model(model),
        machine,
        training_job(job, seq_len, global_batch, precision, {"precision": machine.usual_precision}),
        world_size=number_of_ranks(machine, ranks, nodes),
        memory_budget_bytes=memory_bytes(memory),
        imbalance=imbalance,
        objective=objective,
        top=top,
    )
    save(output, planning.plan, header=f"A plan by pipermoe {__version__}: {planning.plan.strategy.compact()}")
    show(planning, lambda console: render_planning(planning, console), as_json=json)
    note(f"Wrote {output}", as_json=json)

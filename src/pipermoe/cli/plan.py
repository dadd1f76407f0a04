"""`pipermoe plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pipermoe import __version__
from pipermoe.cli.options import Output, Switch, memory_bytes, training_job
from pipermoe.cli.output import note, show


def plan(
    model: str,
    *,
    platform: Path,
    job: Path | None = None,
    ranks: Annotated[int | None, Parameter(name=["--ranks", "--gpus"])] = None,
    seq_len: int | None = None,
    global_batch: int | None = None,
    memory: str | None = None,
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
        Number of ranks. Default: the ranks of the platform's host.
    seq_len
        Tokens in a sequence.
    global_batch
        Sequences in a step.
    memory
        Memory budget of one rank, for example 80GiB. Default: the platform's.
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
    machine = load_platform(str(platform))
    planning = find_plan(
        load_model(model),
        machine,
        training_job(job, seq_len, global_batch),
        world_size=machine.host.ranks if ranks is None else ranks,
        memory_budget_bytes=memory_bytes(memory),
        top=top,
    )
    save(output, planning.plan, header=f"A plan by pipermoe {__version__}: {planning.plan.strategy.compact()}")
    show(planning, lambda console: render_planning(planning, console), as_json=json)
    note(f"Wrote {output}", as_json=json)

"""`pipermoe export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipermoe.cli.options import Output, Switch
from pipermoe.cli.output import note, show

DEFAULT_RANKS_PER_NODE = 8


def export(
    target: Literal["megatron", "torchtitan", "deepspeed"],
    *,
    plan: Path,
    output: Output | None = None,
    platform: Path | None = None,
    ranks_per_node: int | None = None,
    json: Switch = False,
) -> None:
    """Write a plan as a job of another system.

    Parameters
    ----------
    target
        Megatron-LM's pretrain_gpt.py, torchtitan, or DeepSpeed with AutoEP.
    plan
        The plan file (see `pipermoe plan`).
    output
        The folder to write. Default: the target's name.
    platform
        The platform file: its ranks per node, and the price of the nearest plan where this one has no form.
    ranks_per_node
        Ranks that one node starts. Default: the platform's; without one 8, or all of a smaller plan.
    json
        Print the files as JSON, too.
    """
    from pipermoe.export import export_plan
    from pipermoe.specs.documents import load, require_writable, write_files
    from pipermoe.specs.plan import Plan
    from pipermoe.specs.platform import Platform

    folder = output or Path(target)
    require_writable(folder / "launch.sh")
    document = load(plan, Plan)
    machine = load(platform, Platform) if platform else None
    most = machine.host.ranks if machine else DEFAULT_RANKS_PER_NODE
    job = export_plan(
        document,
        target,
        ranks_per_node or min(most, document.strategy.world_size),
        where=str(plan),
        platform=machine,
    )
    paths = write_files(folder, job.files)
    show(job, lambda console: console.print(f"{document.strategy.compact()} for {job.tested_with}"), as_json=json)
    for path in paths:
        note(f"Wrote {path}", as_json=json)

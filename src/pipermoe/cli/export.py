"""`pipermoe export`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from pipermoe.cli.options import Output, Switch
from pipermoe.cli.output import note, show
from pipermoe.specs.errors import UserError

DEFAULT_RANKS_PER_NODE = 8
SLURM_TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}|UNLIMITED", re.ASCII)


def _is_slurm_time(_: object, text: str) -> None:
    if not SLURM_TIME.fullmatch(text):
        forms = "24:00:00, 7-12 (days-hours) or 90 (minutes)"
        raise UserError(f"--time = {text!r}: must be a limit of Slurm, such as {forms}")


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmOptions:
    """What a Slurm job asks for."""

    time: Annotated[str, Parameter(help="The limit of a Slurm job.", validator=_is_slurm_time)] = "24:00:00"
    partition: Annotated[str | None, Parameter(help="The partition of a Slurm job. Default: the cluster's.")] = None
    account: Annotated[str | None, Parameter(help="The account of a Slurm job. Default: the user's.")] = None
    cpu: Annotated[bool, Parameter(negative="", help="Ask Slurm for no GPUs.")] = False


A_DAY = SlurmOptions()


def export(
    target: Literal["megatron", "torchtitan", "deepspeed", "slurm"],
    *,
    plan: Path,
    output: Output | None = None,
    platform: str | None = None,
    ranks_per_node: int | None = None,
    runs: Literal["pipermoe", "megatron", "torchtitan", "deepspeed"] = "pipermoe",
    slurm: SlurmOptions = A_DAY,
    json: Switch = False,
) -> None:
    """Write a plan as a job of another system.

    Parameters
    ----------
    target
        Megatron-LM's pretrain_gpt.py, torchtitan, DeepSpeed with AutoEP; or slurm: a batch script for what --runs says.
    plan
        The plan file (see `pipermoe plan`).
    output
        The folder to write. Default: the target's name.
    platform
        A machine of the catalogue or a platform file: its ranks per node, and the price of the nearest plan where this
        one has no form. Default: the plan's, if that is of the catalogue.
    ranks_per_node
        Ranks that one node starts. Default: the platform's; without one 8, or all of a smaller plan.
    runs
        What a Slurm job runs.
    json
        Print the files as JSON, too.
    """
    from pipermoe.export import cluster_of, export_plan
    from pipermoe.export.slurm import batch_script
    from pipermoe.specs.documents import load, require_writable, write_files
    from pipermoe.specs.plan import Plan
    from pipermoe.specs.platform_file import load_platform, platform_names

    folder = output or Path(target)
    require_writable(folder / "launch.sh")
    document = load(plan, Plan)
    if platform is None and document.platform in platform_names():
        platform = document.platform
    machine = load_platform(platform) if platform else None
    most = machine.host.ranks if machine else DEFAULT_RANKS_PER_NODE
    per_node = min(most, document.strategy.world_size) if ranks_per_node is None else ranks_per_node
    system = runs if target == "slurm" else target
    job = export_plan(document, system, per_node, where=str(plan), platform=machine)
    if target == "slurm":
        options = {"time": slurm.time, "partition": slurm.partition, "account": slurm.account}
        script = batch_script(document.name, cluster_of(document, per_node), gpus=not slurm.cpu, **options)
        job = job.model_copy(update={"files": job.files | {"job.sbatch": script}})
    paths = write_files(folder, job.files)
    show(job, lambda console: console.print(f"{document.strategy.compact()} for {job.tested_with}"), as_json=json)
    for path in paths:
        note(f"Wrote {path}", as_json=json)

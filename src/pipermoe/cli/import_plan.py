"""`pipermoe import-plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from pipermoe.cli.options import Output, Switch
from pipermoe.cli.output import note, show


def import_plan(
    source: Literal["megatron", "torchtitan", "deepspeed"],
    *arguments: Annotated[str, Parameter(allow_leading_hyphen=True)],
    world_size: Annotated[int | None, Parameter(name=["--world-size", "--ranks", "--gpus"])] = None,
    model: str | None = None,
    seq_len: int | None = None,
    platform: str | None = None,
    output: Output = Path("imported"),
    json: Switch = False,
) -> None:
    """Read what you run today into a model, a job and a strategy, to explain it and to plan something better.

    Parameters
    ----------
    source
        Megatron-LM's pretrain_gpt.py, torchtitan, or DeepSpeed.
    arguments
        Megatron's arguments behind --, or the file: arguments, torchtitan's module (.py), DeepSpeed's configuration
        (.json).
    world_size
        Ranks of the job, which none of them says.
    model
        The model of a DeepSpeed job: a catalogue name, a model file (TOML), a config.json or its folder.
    seq_len
        Tokens in a sequence of a DeepSpeed job.
    platform
        A machine of the catalogue or a platform file, to predict the job on: then a plan file is written, too.
    output
        The folder for model.toml, job.toml, strategy.toml and plan.toml.
    json
        Print what was read as JSON.
    """
    from pipermoe.export.reading import read_job
    from pipermoe.planner.given import plan_given
    from pipermoe.report.configuration import render_configuration
    from pipermoe.specs.documents import require_writable, save
    from pipermoe.specs.platform_file import load_platform

    require_writable(output / "plan.toml")
    machine = load_platform(platform) if platform else None
    read = read_job(source, arguments, world_size, model=model, seq_len=seq_len)
    plan = plan_given(read, machine) if machine else None
    documents = {"model": read.model, "job": read.train, "strategy": read.strategy} | ({"plan": plan} if plan else {})
    show(read, lambda console: render_configuration(read, plan, console), as_json=json)
    for name, document in documents.items():
        note(f"Wrote {save(output / f'{name}.toml', document)}", as_json=json)

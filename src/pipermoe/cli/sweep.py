"""`pipermoe sweep` and `pipermoe compare-platforms`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pipermoe.cli.options import (
    NO_JOB,
    NO_LIMITS,
    JobFile,
    JobOptions,
    LimitOptions,
    ModelName,
    PlatformName,
    Plot,
    Precision,
    Runtime,
    Switch,
    numbers,
    training_job,
)
from pipermoe.cli.output import note, show

if TYPE_CHECKING:
    from pipermoe.planner.sweep import Sweep

Ranks = Annotated[
    str, Parameter(name=["--ranks", "--gpus"], help="Numbers of ranks: one number or several, such as 64,128,256.")
]
Rates = Annotated[Plot | None, Parameter(help="Draw tokens per second and rank into this file (.svg or .png).")]


def sweep(
    model: ModelName,
    *,
    platform: PlatformName,
    ranks: Ranks,
    job: JobFile = None,
    global_batch: str | None = None,
    seq_len: str | None = None,
    experts: str | None = None,
    precision: Precision = None,
    limits: LimitOptions = NO_LIMITS,
    runtime: Runtime = "pipermoe",
    plot: Rates = None,
    json: Switch = False,
) -> None:
    """Plan many jobs: every combination of numbers of ranks, batches, sequences and experts.

    Parameters
    ----------
    global_batch
        Sequences in a step: one number or several.
    seq_len
        Tokens in a sequence: one number or several.
    experts
        Routed experts of a layer: one number or several. Default: the model's.
    json
        Print as JSON.
    """
    from pipermoe.planner.sweep import sweep as plan_all
    from pipermoe.specs.catalogue import load_model
    from pipermoe.specs.platform_file import load_platform

    machine = load_platform(platform)
    given = {"global_batch": global_batch, "seq_len": seq_len, "experts": experts}
    axes = {"ranks": numbers("--ranks", ranks)}
    axes |= {axis: numbers(f"--{axis.replace('_', '-')}", text) for axis, text in given.items() if text is not None}
    first = {axis: values[0] for axis, values in axes.items()}
    defaults = {"precision": machine.usual_precision}
    task = training_job(job, first.get("seq_len"), first.get("global_batch"), precision, defaults)
    result = plan_all(load_model(model), machine, task, axes, runtime=runtime, **limits.limits())
    _show(result, plot, as_json=json)


def compare_platforms(
    model: ModelName,
    *,
    platforms: str,
    ranks: Ranks,
    job: JobOptions = NO_JOB,
    limits: LimitOptions = NO_LIMITS,
    runtime: Runtime = "pipermoe",
    plot: Rates = None,
    json: Switch = False,
) -> None:
    """Plan the same job on several machines.

    Parameters
    ----------
    platforms
        Machines of the catalogue or platform files, such as dgx-h100,dgx-b200,frontier; or all.
    json
        Print as JSON.
    """
    from pipermoe.planner.sweep import compare_platforms as plan_all
    from pipermoe.specs.catalogue import load_model
    from pipermoe.specs.platform_file import load_platform, platform_names

    names = platform_names() if platforms == "all" else [name for name in platforms.split(",") if name]
    machines = [load_platform(name) for name in names]
    task = job.train()
    precision = job.precision if job.job is None else task.precision
    sizes = numbers("--ranks", ranks)
    result = plan_all(load_model(model), machines, task, sizes, precision=precision, runtime=runtime, **limits.limits())
    _show(result, plot, as_json=json)


def _show(result: Sweep, plot: Path | None, *, as_json: bool) -> None:
    from pipermoe.report.picture import write_picture
    from pipermoe.report.sweep import render_sweep, sweep_picture

    show(result, lambda console: render_sweep(result, console), as_json=as_json)
    if plot is not None:
        write_picture(sweep_picture(result), plot)
        note(f"Wrote {plot}", as_json=as_json)

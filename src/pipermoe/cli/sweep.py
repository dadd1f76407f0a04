"""`pipermoe sweep` and `pipermoe compare-platforms`."""

from __future__ import annotations

from pathlib import Path

from pipermoe.cli.options import Switch, memory_bytes, numbers, training_job
from pipermoe.cli.output import note, show


def sweep(
    model: str,
    *,
    platform: str,
    gpus: str,
    job: Path | None = None,
    global_batch: str | None = None,
    seq_len: str | None = None,
    experts: str | None = None,
    precision: str | None = None,
    memory: str | None = None,
    imbalance: float = 1.0,
    plot: Path | None = None,
    json: Switch = False,
) -> None:
    """Plan many jobs: every combination of numbers of ranks, batches, sequences and experts.

    Parameters
    ----------
    model
        A catalogue name, a model file (TOML), a Hugging Face config.json or its folder.
    platform
        A machine of the catalogue (docs/platforms.md) or a platform file (pipermoe measure).
    gpus
        Numbers of ranks, such as 64,128,256.
    job
        The training job (TOML). Options below override it.
    global_batch
        Sequences in a step: one number or several.
    seq_len
        Tokens in a sequence: one number or several.
    experts
        Routed experts of a layer: one number or several. Default: the model's.
    precision
        fp32, bf16, fp16 or fp8. Default without a job: bf16 where the device is faster in it than in fp32.
    memory
        Memory budget of one rank, for example 80GiB. Default: the platform's.
    imbalance
        Rows of the busiest rank over the mean; 1 is balanced routing.
    plot
        Draw tokens per second and rank into this file (.svg or .png).
    json
        Print as JSON.
    """
    from pipermoe.planner.sweep import sweep as plan_all
    from pipermoe.report.picture import write_picture
    from pipermoe.report.sweep import render_sweep, sweep_picture
    from pipermoe.specs.catalogue import load_model
    from pipermoe.specs.platform_file import load_platform

    machine = load_platform(platform)
    given = {"global_batch": global_batch, "seq_len": seq_len, "experts": experts}
    axes = {"gpus": numbers("--gpus", gpus)}
    axes |= {axis: numbers(f"--{axis.replace('_', '-')}", text) for axis, text in given.items() if text is not None}
    first = {axis: values[0] for axis, values in axes.items()}
    defaults = {"precision": machine.usual_precision}
    task = training_job(job, first.get("seq_len"), first.get("global_batch"), precision, defaults)
    budget = memory_bytes(memory)
    result = plan_all(load_model(model), machine, task, axes, memory_budget_bytes=budget, imbalance=imbalance)
    show(result, lambda console: render_sweep(result, console), as_json=json)
    if plot is not None:
        write_picture(sweep_picture(result), plot)
        note(f"Wrote {plot}", as_json=json)


def compare_platforms(
    model: str,
    *,
    platforms: str,
    gpus: str,
    seq_len: int | None = None,
    global_batch: int | None = None,
    job: Path | None = None,
    precision: str | None = None,
    imbalance: float = 1.0,
    plot: Path | None = None,
    json: Switch = False,
) -> None:
    """Plan the same job on several machines.

    Parameters
    ----------
    model
        A catalogue name, a model file (TOML), a Hugging Face config.json or its folder.
    platforms
        Machines of the catalogue or platform files, such as dgx-h100,dgx-b200,frontier; or all.
    gpus
        Numbers of ranks, such as 64,256.
    seq_len
        Tokens in a sequence.
    global_batch
        Sequences in a step.
    job
        The training job (TOML). Options override it.
    precision
        fp32, bf16, fp16 or fp8. Default: the job's, or on every machine bf16 where it is faster than fp32.
    imbalance
        Rows of the busiest rank over the mean; 1 is balanced routing.
    plot
        Draw tokens per second and rank into this file (.svg or .png).
    json
        Print as JSON.
    """
    from pipermoe.planner.sweep import compare_platforms as plan_all
    from pipermoe.report.picture import write_picture
    from pipermoe.report.sweep import render_sweep, sweep_picture
    from pipermoe.specs.catalogue import load_model
    from pipermoe.specs.platform_file import load_platform, platform_names

    names = platform_names() if platforms == "all" else [name for name in platforms.split(",") if name]
    machines = [load_platform(name) for name in names]
    task = training_job(job, seq_len, global_batch, precision)
    if job is not None:
        precision = task.precision
    sizes = numbers("--gpus", gpus)
    result = plan_all(load_model(model), machines, task, sizes, precision=precision, imbalance=imbalance)
    show(result, lambda console: render_sweep(result, console), as_json=json)
    if plot is not None:
        write_picture(sweep_picture(result), plot)
        note(f"Wrote {plot}", as_json=json)

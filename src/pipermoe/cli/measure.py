"""`pipermoe measure`."""

from __future__ import annotations

import os
from pathlib import Path

from pipermoe import __version__
from pipermoe.cli.options import Output, Switch, memory_bytes
from pipermoe.cli.output import note, show


def measure(
    *,
    nproc: int | None = None,
    output: Output = Path("machine.toml"),
    model: str | None = None,
    memory: str | None = None,
    quick: Switch = False,
    check: Path | None = None,
    json: Switch = False,
) -> None:
    """Measure what this machine can do and write it as a platform file.

    Under torchrun or srun the ranks that they have started measure, on as many hosts as they are. What was measured
    before an interruption is kept beside the output, and the next run goes on from there.

    Parameters
    ----------
    nproc
        Ranks on this machine; 4 unless torchrun or srun have started them.
    output
        The platform file to write (TOML).
    model
        Measure at this model's sizes: a catalogue name or a file.
    memory
        Memory budget of one rank, for example 96MiB. Without it: this machine's memory divided by the ranks.
    quick
        Fewer sizes and repeats, about a quarter of the time.
    check
        A platform file of this machine: measure a quick sample again, say what has drifted, write nothing.
    json
        Print the platform as JSON; with --check the changes.
    """
    from pipermoe.measure import measure_platform
    from pipermoe.report.platform import render_platform
    from pipermoe.specs.catalogue import load_model
    from pipermoe.specs.documents import require_writable, save

    if check is not None:
        return _check(check, model, json)
    require_writable(output)
    budget = memory_bytes(memory)
    spec = load_model(model) if model else None
    record = output.with_suffix(".partial.json")
    platform = measure_platform(nproc=nproc, model=spec, memory_bytes=budget, quick=quick, record=record)
    if platform is None:
        return
    save(
        output,
        platform,
        header=f"Measured by pipermoe {__version__}. Edit freely; every number has its evidence below.",
    )
    record.unlink()
    show(platform, lambda console: render_platform(platform, console), as_json=json)
    note(f"Wrote {output}", as_json=json)


def _check(file: Path, model: str | None, json: bool) -> None:
    from pipermoe.measure import measure_platform
    from pipermoe.measure.drift import Drifts, drifts
    from pipermoe.processes.world import existing_world
    from pipermoe.report.platform import render_drifts
    from pipermoe.specs.catalogue import load_model
    from pipermoe.specs.platform_file import load_platform

    then = load_platform(str(file))
    nproc = None if existing_world(os.environ) else then.host.ranks
    now = measure_platform(nproc=nproc, model=load_model(model) if model else None, quick=True)
    if now is None:
        return
    found = Drifts(changes=drifts(then, now), noise=now.host.noise)
    show(found, lambda console: render_drifts(found, console), as_json=json)

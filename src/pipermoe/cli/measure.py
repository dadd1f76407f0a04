"""`pipermoe measure`."""

from __future__ import annotations

from pathlib import Path

from pipermoe import __version__
from pipermoe.cli.options import Output, Switch, memory_bytes
from pipermoe.cli.output import note, show


def measure(
    *,
    nproc: int = 4,
    output: Output = Path("machine.toml"),
    model: str | None = None,
    memory: str | None = None,
    quick: Switch = False,
    json: Switch = False,
) -> None:
    """Measure what this machine can do and write it as a platform file.

    Parameters
    ----------
    nproc
        Ranks on this machine.
    output
        The platform file to write (TOML).
    model
        Measure at this model's sizes: a catalogue name or a file.
    memory
        Memory budget of one rank, for example 96MiB. Without it: this machine's memory divided by the ranks.
    quick
        Fewer sizes and repeats, about a quarter of the time.
    json
        Print the platform as JSON.
    """
    from pipermoe.measure import measure_platform
    from pipermoe.report.platform import render_platform
    from pipermoe.specs.catalogue import load_model
    from pipermoe.specs.documents import require_writable, save

    require_writable(output)
    budget = memory_bytes(memory)
    spec = load_model(model) if model else None
    platform = measure_platform(nproc=nproc, model=spec, memory_bytes=budget, quick=quick)
    save(
        output,
        platform,
        header=f"Measured by pipermoe {__version__}. Edit freely; every number has its evidence below.",
    )
    show(platform, lambda console: render_platform(platform, console), as_json=json)
    note(f"Wrote {output}", as_json=json)

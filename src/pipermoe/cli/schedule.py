"""`pipermoe schedule`."""

from __future__ import annotations

from pathlib import Path

from pipermoe.cli.options import Plot, Switch
from pipermoe.cli.output import note, show


def schedule(
    name: str,
    *,
    pp: int = 4,
    microbatches: int = 8,
    vpp: int | None = None,
    plot: Plot | None = None,
    csv: Path | None = None,
    trace: Path | None = None,
    json: Switch = False,
) -> None:
    """Print a pipeline schedule as papers do; draw it, export it for torch, trace it.

    Parameters
    ----------
    name
        1f1b, gpipe, interleaved-1f1b, zb-h1, zb-v, dualpipe, ...; or a CSV file of torch.distributed.pipelining.
    pp
        Pipeline ranks.
    microbatches
        Micro-batches of one step.
    vpp
        Model chunks per rank. Default: the fewest that the schedule takes.
    plot
        Draw it into this file (SVG or PNG).
    csv
        Write it in the format of torch.distributed.pipelining.
    trace
        Write a Chrome trace (open in ui.perfetto.dev).
    json
        Print the actions, the bubble and the activations in flight as JSON.
    """
    from pipermoe.report.schedule import draw, render_table, summary, write_trace
    from pipermoe.schedule.builders import build_or_read
    from pipermoe.schedule.timeline import simulate
    from pipermoe.schedule.torch_csv import write_csv

    built = build_or_read(name, pp, microbatches, vpp)
    timeline = simulate(built)
    for path, write in (
        (csv, lambda path: write_csv(built, path)),
        (plot, lambda path: draw(timeline, path)),
        (trace, lambda path: write_trace(timeline, path)),
    ):
        if path is not None:
            write(path)
            note(f"Wrote {path}", as_json=json)
    show(summary(timeline), lambda console: print(render_table(built, width=console.width)), as_json=json)

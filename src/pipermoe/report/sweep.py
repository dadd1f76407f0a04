"""A sweep as a table and as a chart."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipermoe.planner.sweep import Case, Sweep
from pipermoe.report.chart import Titles, bar_chart, line_chart
from pipermoe.report.picture import Picture
from pipermoe.specs.errors import UserError
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import format_bytes, format_seconds

SPEED = "tokens/s per rank"
WORDS = {"ranks": "ranks", "global_batch": "sequences a step", "seq_len": "tokens a sequence", "experts": "experts"}


def render_sweep(result: Sweep, console: Console) -> None:
    """Print the table: the best strategy of every case, or why it has none."""
    table = Table(title=result.title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for axis in result.axes:
        table.add_column(axis, justify="left" if axis == "platform" else "right", no_wrap=True)
    table.add_column("best strategy", overflow="fold")
    for name in ("memory", "step", "tokens/s", "per rank", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in result.cases:
        values = [str(case.values[axis]) for axis in result.axes]
        table.add_row(*values, *_cells(case))
    console.print(table, highlight=False)


def _cells(case: Case) -> list[str]:
    best = case.best
    if best is None:
        return [case.reason]
    return [
        strategy_text(best.strategy),
        format_bytes(best.peak_bytes),
        format_seconds(best.step_seconds),
        f"{best.tokens_per_second:,.0f}",
        f"{case.tokens_per_second_per_rank:,.0f}",
        f"{best.model_flops_utilization:.1%}",
    ]


def sweep_picture(result: Sweep) -> Picture:
    """Tokens per second and rank: lines over the first axis, one for each value of the others; bars for machines."""
    first, *others = result.axes
    found = [case for case in result.cases if case.best]
    if not found:
        raise UserError("--plot: no case has a strategy to draw")
    if first == "platform":
        names = [" ".join(str(case.values[axis]) for axis in result.axes) for case in result.cases]
        speeds = [case.tokens_per_second_per_rank for case in result.cases]
        return bar_chart(dict(zip(names, speeds, strict=True)), Titles(result.title, SPEED, ""))
    series: dict[str, list[tuple[float, float]]] = {}
    for case in found:
        name = ", ".join(f"{case.values[axis]} {WORDS[axis]}" for axis in others) or "best strategy"
        series.setdefault(name, []).append((float(case.values[first]), case.tokens_per_second_per_rank))
    return line_chart(series, Titles(result.title, WORDS[first], SPEED))

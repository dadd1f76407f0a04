"""A whole run and the front of time against memory, as text and picture."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pipermoe.planner.result import Campaign, Candidate
from pipermoe.report.chart import Titles, line_chart
from pipermoe.report.picture import Picture
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import GIB, format_bytes, format_count, format_number, format_seconds

HOUR, DAY = 3600.0, 86_400.0


def campaign_text(run: Campaign, world_size: int) -> str:
    """`15 T tokens: 61.2 days on 2,048 ranks, 3.01 M device-hours; ...`."""
    cost = "" if run.cost is None else f", cost {run.cost:,.0f}"
    return (
        f"{format_count(run.tokens)} tokens: {run.seconds / DAY:,.3g} days on {format_number(world_size, 'rank')}, "
        f"{format_count(run.device_hours)} device-hours{cost}; {run.goodput:.1%} of the time is progress, with "
        f"{run.failures:,.3g} failures and a checkpoint every {run.checkpoint_interval_seconds / HOUR:.2g} h"
    )


def front_table(front: Sequence[Candidate]) -> Table:
    """The points from the fastest to the smallest."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("strategy", overflow="fold")
    for name in ("memory", "step", "slower"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in front:
        slower = point.step_seconds / front[0].step_seconds - 1
        cells = (format_bytes(point.peak_bytes), format_seconds(point.step_seconds), f"{slower:+.1%}")
        table.add_row(strategy_text(point.strategy), *cells)
    return table


def front_picture(front: Sequence[Candidate], title: str) -> Picture:
    """Step seconds over GiB of the worst rank."""
    points = [(point.peak_bytes / GIB, point.step_seconds) for point in front]
    return line_chart({"not beaten in both": points}, Titles(title, "GiB of the worst rank", "seconds a step"))

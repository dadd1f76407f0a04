"""How a dry run reads on a terminal: the memory at its peak, where that is, FLOPs and traffic, action by action."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipermoe.report.plan import bar
from pipermoe.specs.footprint import ActionFootprint, Footprint
from pipermoe.specs.report import MEMORY_CATEGORIES, Traffic
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import format_bytes, format_count, format_ranges

NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
    "SEND_F": "send output",
    "RECV_F": "receive input",
    "SEND_B": "send gradient",
    "RECV_B": "receive gradient",
}


def render_footprint(footprint: Footprint, console: Console) -> None:
    """Print `footprint`."""
    console.print(Group(*_sections(footprint)), highlight=False)


def _sections(footprint: Footprint) -> Iterator[RenderableType]:
    report = footprint.report
    yield _header(footprint)
    yield ""
    peak = Text.assemble(("Peak", "bold"), f"  {format_bytes(report.peak_bytes)} {place(footprint.peak_action)}")
    yield peak
    yield _bars({name: report.memory_bytes[name] for name in MEMORY_CATEGORIES}, "magenta", format_bytes)
    yield ""
    yield Text.assemble(("FLOPs", "bold"), f"  {format_count(report.flops, 'FLOP')} a step")
    yield _bars(footprint.flops_by_module, "cyan", lambda count: format_count(count, "FLOP"))
    yield ""
    yield _traffic(report.traffic)
    yield ""
    yield _actions(footprint)


def place(action: ActionFootprint) -> str:
    """Where an action is, in words."""
    if action.stage is None:
        return f"in {words(action.kind)}, after the pipeline"
    return f"in {action.action} ({words(action.kind)} of micro-batch {action.microbatch} on stage {action.stage})"


def words(kind: str) -> str:
    return NAMES.get(kind, kind.replace("_", " "))


def _header(footprint: Footprint) -> Table:
    strategy, train, routing = footprint.strategy, footprint.train, footprint.routing
    layers = format_ranges(footprint.layers)
    stages = ", ".join(map(str, footprint.stages))
    grid = _grid("bold", "default")
    grid.add_row("Model", footprint.model)
    grid.add_row("Strategy", strategy_text(strategy))
    grid.add_row("Rank", f"{footprint.report.rank} of {strategy.world_size}: stage {stages}, layers {layers}")
    grid.add_row(
        "Job",
        f"{train.global_batch_size} sequences of {train.seq_len}, {train.precision}; "
        f"{footprint.microbatches} micro-batches of {strategy.micro_batch_size}",
    )
    share = f"{routing.rows / routing.mean_rows:.2f} of the mean" if routing.mean_rows else "none"
    busiest = f"busiest rank {routing.busiest_rank} with {routing.busiest_rows:,}"
    grid.add_row("Routing", f"{routing.description}; {routing.rows:,} rows a layer, {share}; {busiest}")
    return grid


def _bars(values, style: str, show) -> Table:
    grid = _grid("default", style, "default", right=(2,))
    longest = max(values.values(), default=0)
    for name, value in values.items():
        if value:
            grid.add_row(f"  {words(name)}", bar(value / longest), show(value))
    return grid


def _traffic(traffic: dict[str, Traffic]) -> RenderableType:
    title = Text.assemble(("Traffic", "bold"), "  of this rank in a step")
    grid = _grid("default", "default", "default", "default", right=(2, 3))
    for key, sent in traffic.items():
        collective, _, axis = key.partition(".")
        calls = f"{sent.calls:,} call{'s' if sent.calls > 1 else ''}"
        grid.add_row(f"  {words(collective)}", f"over {axis}", calls, format_bytes(sent.bytes))
    return Group(title, grid if traffic else "  none")


def _actions(footprint: Footprint) -> Table:
    """One row for all actions of a kind: they differ by micro-batch, and by stage where a rank has several."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("")
    for name in ("actions", "FLOPs each", "sent each", "highest"):
        table.add_column(name, justify="right")
    for kind in dict.fromkeys(action.kind for action in footprint.actions):
        same = [action for action in footprint.actions if action.kind == kind]
        flops = [action.flops for action in same]
        sent = [sum(traffic.bytes for traffic in action.traffic.values()) for action in same]
        table.add_row(
            words(kind),
            str(len(same)),
            _span(flops, lambda count: format_count(count, "FLOP")),
            _span(sent, format_bytes),
            format_bytes(max(action.peak_bytes for action in same)) if any(a.peak_bytes for a in same) else "",
        )
    return table


def _span(values: list[int], show) -> str:
    if not any(values):
        return ""
    return " to ".join(dict.fromkeys((show(min(values)), show(max(values)))))  # one where both look the same


def _grid(*styles: str, right: tuple[int, ...] = ()) -> Table:
    grid = Table.grid(padding=(0, 2))
    for index, style in enumerate(styles):
        grid.add_column(style=style, justify="right" if index in right else "left")
    return grid

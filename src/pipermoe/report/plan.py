"""How a planning result reads on a terminal: the ranking, where the step goes, the memory, why the others lose."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipermoe.planner.result import Alternative, Candidate, PlanningResult
from pipermoe.specs.report import MEMORY_CATEGORIES, TERMS, Term
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.units import MIB, format_bytes, format_count, format_seconds

WIDTH = 100
BAR = 30  # cells of the longest bar

WORDS: dict[Term, str] = {
    "forward": "forward",
    "backward": "backward",
    "all_to_all": "all-to-all",
    "pipeline_wait": "pipeline wait",
    "gradient_sync": "gradient sync",
    "optimizer": "optimizer",
    "other": "other",
}
AXES = {
    "pipeline_parallel": "pp",
    "expert_parallel": "ep",
    "micro_batch_size": "mbs",
    "schedule": "",
    "recompute": "recompute ",
    "zero_dense": "dense z",
    "zero_expert": "expert z",
}


def render_planning(result: PlanningResult, console: Console) -> None:
    """Print `result` in at most 100 columns; a file or a pipe gets all of them."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    console.print(Group(*_sections(result)), width=min(WIDTH, console.width), highlight=False)


def _sections(result: PlanningResult) -> Iterator[RenderableType]:
    chosen = result.chosen
    yield _header(result)
    yield _ranking(result)
    yield ""
    yield Text.assemble(("Where the step goes", "bold"), f"  {format_seconds(chosen.step_seconds)}, mean over ranks")
    yield _bars(chosen)
    yield Text.assemble(("Bound by", "bold"), f"  {result.bottleneck}")
    yield ""
    yield _memory(result)
    yield ""
    yield Text("Why not", style="bold")
    yield _why_not(result)


def _header(result: PlanningResult) -> Table:
    model, train, counts = result.model, result.train, result.counts
    grid = _grid("bold", "default")
    experts = f"{model.moe.num_experts} experts top-{model.moe.top_k}"
    grid.add_row(
        "Model", f"{model.name}  {format_count(result.parameters)} parameters, {model.num_layers} layers, {experts}"
    )
    cores = f"{result.compute_slots:.3g} core" + "s" * (result.compute_slots != 1)
    shared = "" if result.compute_slots >= result.world_size else f" on {cores}"
    budget = format_bytes(result.memory_budget_bytes)
    grid.add_row("Machine", f"{result.platform}: {result.world_size} ranks{shared}, {budget} each")
    tokens = f"{train.tokens_per_step:,} tokens a step"
    grid.add_row("Job", f"{train.global_batch_size} sequences of {train.seq_len}, {tokens}, {train.precision}, AdamW")
    found = (
        f"{counts.considered:,} strategies in {format_seconds(result.search_seconds)}: {counts.illegal:,} illegal, "
        f"{counts.redundant:,} redundant, {counts.not_fitting:,} do not fit, {counts.pruned:,} pruned by bound, "
        f"{counts.simulated:,} simulated"
    )
    grid.add_row("Search", found)
    return grid


def _ranking(result: PlanningResult) -> RenderableType:
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for name in ("#", "layout", "schedule", "recompute", "mbs", "memory MiB", "step", "tokens/s", "MFU", ""):
        table.add_column(
            name, justify="left" if name in ("layout", "schedule", "recompute", "") else "right", no_wrap=True
        )
    for place, row in enumerate(result.ranked, start=1):
        slower = row.step_seconds / result.chosen.step_seconds - 1
        table.add_row(
            str(place),
            row.strategy.compact(),
            row.strategy.schedule if row.strategy.pipeline_parallel > 1 else "-",
            row.strategy.recompute,
            str(row.strategy.micro_batch_size),
            f"{row.peak_bytes / MIB:,.1f}",
            format_seconds(row.step_seconds),
            f"{row.tokens_per_second:,.0f}",
            f"{row.model_flops_utilization:.1%}",
            "CHOSEN" if place == 1 else f"+{slower:.1%}",
            style="bold green" if place == 1 else "",
        )
    return Padding(table, (1, 0, 0, 0))


def _bars(chosen: Candidate) -> Table:
    """Seconds by term, each with a bar in eighths of a cell."""
    longest = max(chosen.seconds.values())
    grid = _grid("default", "cyan", "default", "default", right=(2, 3))
    for term in TERMS:
        seconds = chosen.seconds[term]
        if seconds > 0:
            share = f"{seconds / chosen.step_seconds:.0%}"
            grid.add_row(f"  {WORDS[term]}", bar(seconds / longest), format_seconds(seconds), share)
    return grid


def bar(share: float, cells: int = BAR) -> str:
    """A bar of `share` of `cells` cells, to the eighth: never empty, so that what exists is seen."""
    eighths = max(1, round(share * cells * 8))
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]


def _memory(result: PlanningResult) -> RenderableType:
    chosen, budget = result.chosen, result.memory_budget_bytes
    title = Text.assemble(
        ("Memory", "bold"),
        f"  worst rank {chosen.worst_rank}: {format_bytes(chosen.peak_bytes)} of {format_bytes(budget)}, "
        f"{format_bytes(budget - chosen.peak_bytes)} free",
    )
    grid = _grid("default", "magenta", "default", right=(2,))
    longest = max(chosen.memory_bytes.values())
    for name in MEMORY_CATEGORIES:
        count = chosen.memory_bytes[name]
        if count:
            grid.add_row(f"  {name}", bar(count / longest), format_bytes(count))
    return Group(title, grid)


def _why_not(result: PlanningResult) -> Table:
    grid = _grid("bold", "default", "default")
    for other in result.alternatives:
        label = ", ".join(f"{AXES[axis]}{getattr(other.strategy, axis)}" for axis in other.axes)
        grid.add_row(f"  {label}", _name(other.strategy), reason(other))
    return grid


def reason(other: Alternative) -> str:
    """Why this alternative loses, in one clause."""
    if not other.fits:
        return f"{format_bytes(other.missing_bytes)} too much on rank {other.rank}: {other.category}"
    slower = format_seconds(other.slower_seconds)
    if other.term is None or other.term_seconds <= 0:
        return "as fast, more memory"
    return f"{slower} slower: {WORDS[other.term]} +{format_seconds(other.term_seconds)}"


def _name(strategy: Strategy) -> str:
    schedule = f" {strategy.schedule}" if strategy.pipeline_parallel > 1 else ""
    recompute = f" {strategy.recompute} recompute" if strategy.recompute != "none" else ""
    return f"{strategy.compact()} mbs{strategy.micro_batch_size}{schedule}{recompute}"


def _grid(*styles: str, right: tuple[int, ...] = ()) -> Table:
    grid = Table.grid(padding=(0, 2))
    for index, style in enumerate(styles):
        grid.add_column(style=style, justify="right" if index in right else "left")
    return grid

"""How a planning result reads on a terminal: ranking, where the step goes, memory, why not others, what helps."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipermoe.planner.result import Alternative, PlanningResult, Wall
from pipermoe.report.bars import bar
from pipermoe.report.campaign import campaign_text, front_table
from pipermoe.specs.report import MEMORY_CATEGORIES, Term
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import GIB, MIB, format_bytes, format_count, format_number, format_seconds

WIDTH = 100
MOST_ALTERNATIVES = 12
SAME = 5e-4  # the share of a step, or of its speed, from which on a difference is printed

WORDS: dict[Term, str] = {
    "forward": "forward",
    "backward": "backward",
    "all_to_all": "all-to-all",
    "pipeline_wait": "pipeline wait",
    "gradient_sync": "gradient sync",
    "optimizer": "optimizer",
    "other": "other",
}
PARTS = {
    "attention": "attention",
    "experts": "expert products",
    "routing": "router, permutation",
    "dense_mlp": "dense, shared MLP",
    "head": "embedding, head",
    "recompute": "recompute",
    "host": "host",
    "imbalance": "load imbalance",
    **WORDS,
}
WALLS: dict[Wall, str] = {
    "compute": "compute wall",
    "communication": "communication wall",
    "bubble": "pipeline bubble",
    "memory": "memory wall",
    "imbalance": "load imbalance",
    "host": "host-bound",
}


def render_planning(result: PlanningResult, console: Console) -> None:
    """Print `result` in at most 100 columns; a file or a pipe gets all of them."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH)
    console.print(Group(*_sections(result)), width=min(WIDTH, console.width), highlight=False)


def _sections(result: PlanningResult) -> Iterator[RenderableType]:
    chosen, explanation = result.chosen, result.explanation
    yield _header(result)
    yield _ranking(result)
    yield _known_error(result)
    yield ""
    yield Text.assemble(("Where the step goes", "bold"), f"  {format_seconds(chosen.step_seconds)}, mean over ranks")
    yield _parts(result)
    yield Text.assemble(("Bound by", "bold"), f"  {WALLS[explanation.wall]}: {explanation.verdict}")
    yield _findings(result)
    yield ""
    yield from _memory(result)
    yield ""
    yield Text("Why not", style="bold")
    yield _why_not(result)
    yield ""
    yield Text("What would help", style="bold")
    yield _what_if(result)
    if result.pareto:
        yield ""
        yield Text("From the fastest to the smallest", style="bold")
        yield Padding(front_table(result.pareto), (0, 0, 0, 2))


def _header(result: PlanningResult) -> Table:
    model, train, counts = result.model, result.train, result.counts
    grid = _grid("bold", "default")
    sizes = f"{format_count(result.parameters)} parameters, {format_count(result.active_parameters)} active"
    experts = f"{model.moe.num_experts} experts top-{model.moe.top_k}"
    grid.add_row("Model", f"{model.name}  {sizes}, {model.num_layers} layers, {experts}")
    ranks, crowded = format_number(result.world_size, "rank"), result.compute_slots < result.world_size
    shared = f" on {format_number(result.compute_slots, 'core')}" if crowded else ""
    budget, spared = format_bytes(result.memory_budget_bytes), f", {result.headroom:.0%} of it left free (--headroom)"
    grid.add_row(
        "Machine",
        f"{result.platform}: {ranks}{shared}, {budget} each{spared if result.headroom else ''}",
    )
    tokens = f"{format_count(train.tokens_per_step)} tokens a step"
    grid.add_row(
        "Job", f"{train.global_batch_size:,} sequences of {train.seq_len:,} = {tokens}, {train.precision}, AdamW"
    )
    routing = "balanced (--imbalance)" if result.imbalance == 1 else f"{result.imbalance:g}x busiest rank over mean"
    grid.add_row("Routing", f"{routing}")
    grid.add_row("Runs on", ", ".join(result.plan.runs_on) or "no runtime that pipermoe knows")
    if result.campaign:
        grid.add_row("Run", campaign_text(result.campaign, result.world_size))
    if counts:
        found = (
            f"{counts.considered:,} strategies in {format_seconds(result.search_seconds)}: "
            f"{counts.illegal:,} illegal or not for this runtime, "
            f"{counts.redundant:,} redundant, {counts.not_fitting:,} do not fit, {counts.pruned:,} pruned by bound, "
            f"{counts.simulated:,} simulated"
        )
        grid.add_row("Search", found)
    return grid


def _ranking(result: PlanningResult) -> RenderableType:
    unit, name = (GIB, "GiB") if result.chosen.peak_bytes >= GIB else (MIB, "MiB")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("#")
    table.add_column("strategy", overflow="fold")
    for title in (name, "free", "step", "tok/s\n/rank", "MFU"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True, min_width=len("CHOSEN"))
    for place, row in enumerate(result.ranked, start=1):
        slower = row.step_seconds / result.chosen.step_seconds - 1
        behind = "as fast" if abs(slower) < SAME else f"{slower:+.1%}"
        chosen = ("CHOSEN" if result.counts else "GIVEN") if place == 1 else behind
        table.add_row(
            str(place),
            strategy_text(row.strategy),
            f"{row.peak_bytes / unit:,.1f}",
            f"{(result.memory_budget_bytes - row.peak_bytes) / unit:,.1f}",
            format_seconds(row.step_seconds),
            f"{row.tokens_per_second / result.world_size:,.0f}",
            f"{row.model_flops_utilization:.1%}",
            chosen,
            style="bold green" if place == 1 else "",
        )
    return Padding(table, (1, 0, 0, 0))


def _known_error(result: PlanningResult) -> Text:
    band, ties, rows = result.error_band, result.ties, len(result.ranked)
    if rows == 1:
        order = ""
    elif ties == rows:
        order = "All rows lie within that of the first: their order is likely, not certain. "
    elif ties == 1:
        order = "All other rows are slower by more than that. "
    else:
        order = f"Rows 2 to {ties} lie within that of the first: their order is likely, not certain. "
    return Text(
        f"The model's error on this class of machine is about ±{band.error:.0%} ({band.source}). {order}"
        "MFU counts model FLOPs with causal attention, no recomputation.",
        style="dim",
    )


def _parts(result: PlanningResult) -> Table:
    """Seconds by part, each with a bar in eighths of a cell."""
    parts, step = result.explanation.parts, result.chosen.step_seconds
    longest = max(parts.values())
    grid = _grid("default", "cyan", "default", "default", right=(2, 3))
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        if seconds > 1e-9 * step:
            grid.add_row(f"  {PARTS[name]}", bar(seconds / longest), format_seconds(seconds), f"{seconds / step:.0%}")
    return grid


def _findings(result: PlanningResult) -> Table:
    grid = _grid("default", "default")
    for finding in result.explanation.findings:
        grid.add_row(f"  {finding.name}", finding.sentence)
    return grid


def _memory(result: PlanningResult) -> Iterator[RenderableType]:
    chosen, budget = result.chosen, result.memory_budget_bytes
    free = budget - chosen.peak_bytes
    room = f"{format_bytes(free)} free" if free >= 0 else f"{format_bytes(-free)} TOO MUCH: it does not fit"
    if 0 <= free < int(budget * result.headroom):
        room += f", less than the {result.headroom:.0%} that plans leave"
    yield Text.assemble(
        ("Memory", "bold"),
        f"  worst rank {chosen.worst_rank}: {format_bytes(chosen.peak_bytes)} of {format_bytes(budget)}, ",
        (room, "" if free >= 0 else "bold red"),
    )
    grid = _grid("default", "magenta", "default", right=(2,))
    longest = max(chosen.memory_bytes.values())
    for name in MEMORY_CATEGORIES:
        if count := chosen.memory_bytes[name]:
            grid.add_row(f"  {name}", bar(count / longest), format_bytes(count))
    yield grid


def _why_not(result: PlanningResult) -> Table:
    grid = _grid("bold", "default")
    for other in result.explanation.alternatives[:MOST_ALTERNATIVES]:
        unable = "" if other.runs else "; not run by this runtime"
        grid.add_row(f"  {other.change}", reason(other, result.chosen.step_seconds) + unable)
    return grid


def reason(other: Alternative, step_seconds: float) -> str:
    """What this alternative costs or lacks, in one clause."""
    change = f"step {other.slower_seconds / step_seconds:+.1%}"
    if not other.fits:
        lack = f"{format_bytes(other.missing_bytes)} too much on rank {other.rank}: {other.category}"
        return f"{lack} ({change})" if other.slower_seconds < 0 else lack
    if other.term is None or abs(other.slower_seconds) < SAME * step_seconds:
        return f"as fast, {format_bytes(abs(other.more_bytes))} {'more' if other.more_bytes >= 0 else 'less'}"
    sign = "+" if other.term_seconds >= 0 else "-"
    return f"{change}: {WORDS[other.term]} {sign}{format_seconds(abs(other.term_seconds))}"


def _what_if(result: PlanningResult) -> Table:
    grid = _grid("default", "default", "default", right=(1,))
    for change in result.explanation.what_ifs:
        inside = change.peak_bytes <= result.memory_budget_bytes
        lack = f"leaves less than {result.headroom:.0%} free" if inside else "does not fit"
        lack = "" if change.fits else f"{lack}: {format_bytes(change.peak_bytes)}"
        other = f"with {strategy_text(change.strategy)}" if change.strategy else ""
        notes = "; ".join(filter(None, [change.way, lack, other]))
        grid.add_row(f"  {change.name}", _gain(change.gain), notes)
    return grid


def _gain(share: float) -> str:
    if abs(share) < SAME:
        return "as fast"
    return f"{share:+.0%} tokens/s" if abs(share) >= 0.01 else f"{share:+.1%} tokens/s"


def _grid(*styles: str, right: tuple[int, ...] = ()) -> Table:
    grid = Table.grid(padding=(0, 2))
    for index, style in enumerate(styles):
        grid.add_column(style=style, justify="right" if index in right else "left")
    return grid

"""A comparison of layout policies on a trace: the table, and the imbalance of every step as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipermoe.layout.replay import Comparison, Replay
from pipermoe.report.picture import Box, Label, Picture, write_picture
from pipermoe.resources.relayout import PricedComparison
from pipermoe.specs.units import format_bytes, format_number, format_seconds

LEFT, TOP, ROW, GAP, CHART, RIGHT, BOTTOM = 110.0, 64.0, 44.0, 10.0, 720.0, 70.0, 24.0
INK, FAINT, GROUND, BAR, HIGH = "#222222", "#666666", "#f2f2f2", "#2f6db3", "#c77c02"
HOT = 1.5
WIDEST = 240  # bars of a row; more steps are averaged


def render_comparison(found: Comparison, console: Console) -> None:
    """Print the table and what each column is."""
    ranks, nodes, slots = (format_number(getattr(found, f"{of}s"), of) for of in ("rank", "node", "slot"))
    console.print(
        f"{found.trace}: {found.experts} experts x {found.layers} layers x {found.steps} steps on {ranks} "
        f"/ {nodes}, {slots} a rank; "
        f"a plan every {found.every} steps from the last {found.window}",
        highlight=False,
    )
    console.print(
        f"popularity of experts: log-normal of sigma {found.sigma:.2f} (R squared {found.r2_log_normal:.2f}; "
        f"Zipf {found.r2_zipf:.2f})\n",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    routed = any(each.nodes_per_token is not None for each in found.policies)
    names = ("planned", "max/mean", "P95", "worst", "cross-node", *(["nodes/token"] if routed else []))
    for name in (*names, "first", "moves", "plan ms"):
        table.add_column(name, justify="right", no_wrap=True)
    best = min(each.met for each in found.policies)
    for each in found.policies:
        table.add_row(*_cells(each, routed), style="bold" if each.met == best else None)
    console.print(table)
    console.print(
        "\nmax/mean: rows of the busiest rank over the mean, on the steps after each plan; no layout of so many slots "
        f"is below {found.bound:.4f}. planned: on the loads planned for. moves: copies a layer and re-plan; first: of "
        "the first plan. max/mean is what --imbalance of `pipermoe plan` and `predict` means.",
        highlight=False,
    )


def _cells(each: Replay, routed: bool) -> Iterator[str]:
    yield each.policy
    yield from (f"{value:.4f}" for value in (each.planned, each.met, each.p95, each.worst_layer))
    yield f"{each.cross_node:.1%}"
    if routed:
        yield f"{each.nodes_per_token:.2f}"
    yield from (f"{value:.1f}" for value in (each.first_moves, each.moves, each.plan_ms))


def render_prices(priced: PricedComparison, console: Console) -> None:
    """Print the comparison, and what each policy makes of the plan's step and memory."""
    render_comparison(priced.comparison, console)
    console.print(
        f"\n{priced.plan}: step {format_seconds(priced.balanced_seconds)} with even routing\n", highlight=False
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for name in ("step", "moves of state, a step", "both over even", "peak memory at P95"):
        table.add_column(name, justify="right", no_wrap=True)
    best = min(price.total_seconds for price in priced.prices)
    for price in priced.prices:
        table.add_row(
            price.policy,
            format_seconds(price.step_seconds),
            format_seconds(price.move_seconds_per_step),
            f"{price.total_seconds / priced.balanced_seconds - 1:+.1%}",
            format_bytes(price.peak_bytes),
            style="bold" if price.total_seconds == best else None,
        )
    console.print(table)


def draw_comparison(found: Comparison, path: Path) -> None:
    """One row of bars per policy: the imbalance of every step above 1, on one scale. SVG or PNG by suffix."""
    highest = max(max(each.imbalance) for each in found.policies)
    joined = math.ceil(len(found.policies[0].imbalance) / WIDEST)
    steps = "a step" if joined == 1 else f"{joined} steps"
    legend = f"each bar the mean of {steps}, from 1 (bottom) to {highest:.2f} (top), orange above {HOT:g}"
    shapes: list[Box | Label] = [
        Label(LEFT, 22, f"{found.trace}: rows of the busiest rank over the mean", 13, INK, "start", bold=True),
        Label(LEFT, 42, legend, 10, FAINT, "start"),
    ]
    for row, each in enumerate(found.policies):
        shapes += _bars(each, TOP + row * (ROW + GAP), highest, joined)
    height = TOP + len(found.policies) * (ROW + GAP) + BOTTOM
    write_picture(Picture(LEFT + CHART + RIGHT, height, shapes), path)


def _bars(each: Replay, top: float, highest: float, step: int) -> Iterator[Box | Label]:
    yield Label(LEFT - 8, top + ROW / 2, each.policy, 10, INK, "end")
    yield Box(LEFT, top, CHART, ROW, GROUND)
    groups = [each.imbalance[first : first + step] for first in range(0, len(each.imbalance), step)]
    for index, group in enumerate(groups):
        value = sum(group) / len(group)
        tall = ROW * (value - 1) / max(highest - 1, 1e-9)
        width = CHART / len(groups)
        tip = f"{each.policy}, from step {index * step + 1} after the first plan: {value:.3f}"
        yield Box(LEFT + index * width, top + ROW - tall, width, tall, HIGH if value > HOT else BAR, tip=tip)
    yield Label(LEFT + CHART + 8, top + ROW / 2, f"{each.met:.3f}", 10, INK, "start")

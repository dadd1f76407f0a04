"""Predicted beside measured, term by term: a plan's StepReport against the StepReport of the run that followed it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from pipermoe.specs.base import Frozen
from pipermoe.specs.errors import UserError
from pipermoe.specs.plan import Measurement, Plan
from pipermoe.specs.report import TERMS, StepReport
from pipermoe.specs.units import format_bytes, format_count, format_seconds

Unit = Literal["s", "B", "FLOP", "calls"]


class Row(Frozen):
    """One quantity on both sides. `error` is (predicted - measured) / measured, None when nothing was measured."""

    group: str
    name: str
    unit: Unit
    predicted: float
    measured: float

    @property
    def error(self) -> float | None:
        return (self.predicted - self.measured) / self.measured if self.measured else None


class Comparison(Frozen):
    """All quantities that a step report holds, and the losses of the run."""

    plan: str
    strategy: str
    rows: tuple[Row, ...]
    validation_loss_before: float
    validation_loss_after: float


def compare(plan: Plan, measurement: Measurement) -> Comparison:
    """Lay the prediction of `plan` beside `measurement`. UserError when they belong to different strategies or jobs."""
    if plan.strategy != measurement.strategy:
        raise UserError(
            f"the plan's strategy ({plan.strategy.compact()}) is not the measured one "
            f"({measurement.strategy.compact()}); compare a run with the plan that it ran"
        )
    return Comparison(
        plan=plan.name,
        strategy=plan.strategy.compact(),
        rows=tuple(_rows(plan.prediction, measurement.report)),
        validation_loss_before=measurement.validation_loss_before,
        validation_loss_after=measurement.validation_loss_after,
    )


def _rows(predicted: StepReport, measured: StepReport) -> Iterator[Row]:
    yield Row(
        group="Time of a step", name="step", unit="s", predicted=predicted.step_seconds, measured=measured.step_seconds
    )
    for term in TERMS:
        sides = predicted.mean_seconds(term), measured.mean_seconds(term)
        if any(sides):
            yield Row(group="Time of a step", name=term, unit="s", predicted=sides[0], measured=sides[1])
    for before, after in zip(predicted.ranks, measured.ranks, strict=True):
        name = f"rank {after.rank}"
        yield Row(group="Peak memory", name=name, unit="B", predicted=before.peak_bytes, measured=after.peak_bytes)
    for before, after in zip(predicted.ranks, measured.ranks, strict=True):
        yield Row(group="FLOPs", name=f"rank {after.rank}", unit="FLOP", predicted=before.flops, measured=after.flops)
    totals = [sum(rank.flops for rank in side.ranks) for side in (predicted, measured)]
    yield Row(group="FLOPs", name="all ranks", unit="FLOP", predicted=totals[0], measured=totals[1])
    keys = sorted({key for side in (predicted, measured) for rank in side.ranks for key in rank.traffic})
    for key in keys:
        calls, sent = zip(_traffic(predicted, key), _traffic(measured, key), strict=True)
        yield Row(group="Traffic", name=f"{key}, calls", unit="calls", predicted=calls[0], measured=calls[1])
        yield Row(group="Traffic", name=f"{key}, bytes", unit="B", predicted=sent[0], measured=sent[1])


def _traffic(report: StepReport, key: str) -> tuple[int, int]:
    """Calls and bytes of one collective over all ranks."""
    found = [rank.traffic[key] for rank in report.ranks if key in rank.traffic]
    return sum(traffic.calls for traffic in found), sum(traffic.bytes for traffic in found)


def render(comparison: Comparison, console: Console) -> None:
    """Print the table "predicted | measured | error"."""
    console.print(_table(comparison))
    fall = comparison.validation_loss_before - comparison.validation_loss_after
    console.print(
        f"\nValidation loss on held-back text  {comparison.validation_loss_before:.3f} before, "
        f"[bold]{comparison.validation_loss_after:.3f}[/bold] after ({fall:+.3f} fallen)"
        if fall >= 0
        else f"\nValidation loss on held-back text rose from {comparison.validation_loss_before:.3f} "
        f"to {comparison.validation_loss_after:.3f}"
    )


def _table(comparison: Comparison) -> RenderableType:
    table = Table(title=f"Plan {comparison.plan}  ({comparison.strategy})", title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("predicted", "measured", "error"):
        table.add_column(name, justify="right")
    group = None
    for row in comparison.rows:
        if row.group != group:
            if group is not None:
                table.add_section()
            table.add_row(Text(row.group, style="bold"), "", "", "")
            group = row.group
        table.add_row(f"  {row.name}", _format(row.predicted, row.unit), _format(row.measured, row.unit), _error(row))
    return table


def _format(value: float, unit: Unit) -> str:
    match unit:
        case "s":
            return format_seconds(value)
        case "B":
            return format_bytes(value)
        case "FLOP":
            return format_count(value, unit)
    return f"{value:,.0f}"


def _error(row: Row) -> Text:
    if row.error is None:
        return Text("exact" if row.predicted == 0 else "not measured", style="dim")
    if row.predicted == row.measured:
        return Text("exact", style="green")
    style = "green" if abs(row.error) <= 0.1 else "yellow" if abs(row.error) <= 0.25 else "red"
    return Text(f"{row.error:+.1%}", style=style)

"""A Validation as tables for a terminal: every row, then what the errors add up to."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipermoe.specs.units import format_count, format_seconds
from pipermoe.validate.accuracy import Summary, Validation
from pipermoe.validate.paper import PaperRow


def render_validation(validation: Validation, console: Console) -> None:
    """Print `validation`."""
    console.print(_row_table(validation))
    console.print(_summary_table("By source, rows not used for fitting", validation.by_source))
    console.print(_summary_table("Overall", validation.overall))
    for group in validation.ranks:
        where = f"{group.model} on {group.n_gpus} {group.gpu}, {group.software}"
        assumed = "; micro-batches of one sequence are assumed" if group.assumed else ""
        correlation = f"rank correlation {group.correlation:+.2f} over {group.mappings} mappings"
        console.print(f"{correlation}: {where}{assumed}", highlight=False)
    if validation.paper:
        console.print(_paper_table(validation.paper))
    for name, ids in validation.fitted_on.items():
        console.print(f"profile {name} was fitted on {', '.join(ids) or 'nothing'}", highlight=False)
    reasons: dict[str, int] = {}
    for reason in validation.not_covered.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    console.print(f"{len(validation.not_covered)} rows are not predicted:", highlight=False)
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        console.print(f"  {count:3} {reason}", highlight=False)


def _row_table(validation: Validation) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("row", "model", "machine", "strategy", "precision", "role"):
        table.add_column(name, no_wrap=name != "strategy")
    for name in ("measured", "predicted", "error"):
        table.add_column(name, justify="right")
    for row in validation.rows:
        measured, predicted = format_seconds(row.measured_seconds), format_seconds(row.predicted_seconds)
        machine = f"{row.n_gpus} {row.gpu}"
        cells = (row.id, row.model, machine, row.strategy, row.precision, row.role)
        table.add_row(*cells, measured, predicted, f"{row.error:+.1%}")
    return table


def _summary_table(title: str, summaries: tuple[Summary, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("rows of")
    for name in ("rows", "mean", "median", "p90", "bias"):
        table.add_column(name, justify="right")
    for line in summaries:
        shares = (f"{share:.1%}" for share in (line.mean, line.median, line.p90))
        table.add_row(line.name, str(line.rows), *shares, f"{line.bias:+.1%}")
    return table


def _paper_table(rows: tuple[PaperRow, ...]) -> Table:
    title = "The paper and X-MoE on MI250X: published beside the best strategy at the same number of GCDs"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("row", "model", "published by"):
        table.add_column(name, no_wrap=True)
    for name in ("GCDs", "published", "predicted", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("best strategy")
    for row in rows:
        cells = (row.id, row.model, row.framework, str(row.gcds), format_count(row.published, "FLOP/s"))
        predicted = "" if row.predicted is None else format_count(row.predicted, "FLOP/s")
        ratio = "" if row.predicted is None else f"{row.predicted / row.published:.2f}"
        table.add_row(*cells, predicted, ratio, row.strategy)
    return table

"""`pipermoe validate`."""

from __future__ import annotations

from pathlib import Path

from pipermoe.cli.options import Switch
from pipermoe.cli.output import show


def validate(*, csv: Path | None = None, paper: Switch = False, json: Switch = False) -> None:
    """Hold the resource model against published measurements: recipe in, prediction out, no tuning per row.

    Parameters
    ----------
    csv
        Rows of the same columns as the file that comes with the package, with models and machines of the catalogue.
    paper
        Also plan the runs of the paper and of X-MoE on Frontier anew, at the same number of GCDs; takes longer.
    json
        Print the result as JSON.
    """
    from pipermoe.report.validation import render_validation
    from pipermoe.validate.accuracy import validate_rows
    from pipermoe.validate.rows import published_rows

    validation = validate_rows(published_rows(csv), paper=paper)
    show(validation, lambda console: render_validation(validation, console), as_json=json)

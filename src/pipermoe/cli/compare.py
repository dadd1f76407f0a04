"""`pipermoe compare`."""

from __future__ import annotations

from pathlib import Path

from pipermoe.cli.options import Switch
from pipermoe.cli.output import show


def compare(
    *,
    plan: Path,
    run: Path,
    json: Switch = False,
) -> None:
    """Lay a plan's prediction beside the measurement of its run: predicted, measured, error.

    Parameters
    ----------
    plan
        The plan file.
    run
        The output folder of `pipermoe train`, or its measurement.json.
    json
        Print as JSON.
    """
    from pipermoe.report.comparison import compare as lay_side_by_side
    from pipermoe.report.comparison import render
    from pipermoe.specs.documents import load
    from pipermoe.specs.plan import Measurement, Plan

    measurement = load(run / "measurement.json" if run.is_dir() else run, Measurement)
    comparison = lay_side_by_side(load(plan, Plan), measurement)
    show(comparison, lambda console: render(comparison, console), as_json=json)

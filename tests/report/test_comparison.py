import io

import pytest
from rich.console import Console
from tests.plans import tiny_plan

from pipermoe.report.comparison import compare, render
from pipermoe.specs.errors import UserError
from pipermoe.specs.plan import Measurement, Plan
from pipermoe.specs.report import RankReport, StepReport, Traffic
from pipermoe.specs.strategy import Strategy


def report(step: float, flops: int, sent: int) -> StepReport:
    ranks = [
        RankReport(
            rank=rank,
            peak_bytes=1000 + rank,
            memory_bytes={},
            flops=flops,
            traffic={"all_to_all.ep": Traffic(calls=4, bytes=sent)},
            seconds={"forward": step / 4, "backward": step / 2, "other": step / 4},
        )
        for rank in range(2)
    ]
    return StepReport(step_seconds=step, ranks=tuple(ranks))


def plan_and_measurement(measured: StepReport) -> tuple[Plan, Measurement]:
    strategy = Strategy(data_parallel=2, expert_parallel=2)
    plan = tiny_plan(strategy).model_copy(update={"prediction": report(1.0, 100, 64)})
    measurement = Measurement(
        plan=plan.name,
        strategy=strategy,
        steps=3,
        measured_steps=2,
        report=measured,
        step_seconds=(1.0, 1.0, 1.0),
        losses=(2.0, 1.5, 1.0),
        validation_loss_before=2.0,
        validation_loss_after=1.25,
        tokens_per_second=16.0,
    )
    return plan, measurement


def test_errors_are_relative_to_what_was_measured():
    comparison = compare(*plan_and_measurement(report(0.8, 100, 128)))
    errors = {(row.group, row.name): row.error for row in comparison.rows}
    assert errors["Time of a step", "step"] == pytest.approx(0.25)
    assert errors["Time of a step", "backward"] == pytest.approx(0.25)
    assert errors["FLOPs", "all ranks"] == 0
    assert errors["Traffic", "all_to_all.ep, calls"] == 0
    assert errors["Traffic", "all_to_all.ep, bytes"] == -0.5
    assert errors["Peak memory", "rank 1"] == 0


def test_terms_add_up_to_the_step():
    comparison = compare(*plan_and_measurement(report(0.8, 100, 128)))
    rows = {row.name: row for row in comparison.rows}
    for side in ("predicted", "measured"):
        assert sum(getattr(rows[term], side) for term in ("forward", "backward", "other")) == pytest.approx(
            getattr(rows["step"], side)
        )


def test_a_term_that_only_one_side_has_is_shown_and_not_dropped():
    plan, measurement = plan_and_measurement(report(1.0, 100, 64))
    ranks = tuple(rank.model_copy(update={"traffic": {}}) for rank in measurement.report.ranks)
    report_without = measurement.report.model_copy(update={"ranks": ranks})
    comparison = compare(plan, measurement.model_copy(update={"report": report_without}))
    row = next(row for row in comparison.rows if row.name == "all_to_all.ep, bytes")
    assert (row.predicted, row.measured, row.error) == (128, 0, None)


def test_a_run_of_another_strategy_is_refused():
    plan, measurement = plan_and_measurement(report(1.0, 100, 64))
    other = measurement.model_copy(update={"strategy": Strategy(data_parallel=2, expert_data_parallel=2)})
    with pytest.raises(UserError, match="compare a run with the plan that it ran"):
        compare(plan, other)


def test_the_table_shows_exact_agreement_and_the_fall_of_the_loss():
    console = Console(file=io.StringIO(), width=100)
    render(compare(*plan_and_measurement(report(0.8, 100, 64))), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "+25.0%" in text
    assert "exact" in text
    assert "2.000 before, 1.250 after" in text

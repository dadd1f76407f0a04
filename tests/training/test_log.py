"""The step line, the JSON lines, and how seconds of steps become a report."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipermoe.layout.trace import read_trace
from pipermoe.specs.report import MEMORY_CATEGORIES, TERMS, RankReport
from pipermoe.specs.units import GIB
from pipermoe.training.log import STEPS_FILE, StepLine, StepLog, format_line
from pipermoe.training.measurement import StepSeconds, central_half, counted_step, measured_steps, step_report

LOADS = np.array([[3, 1], [0, 4]])


def line(step: int = 10, **values) -> StepLine:
    fields = {
        "loss": 1.5568,
        "validation_loss": None,
        "mtp_loss": None,
        "auxiliary_loss": 1.0,
        "z_loss": 0.0,
        "dropped_share": None,
        "skipped": False,
        "memory_bytes": None,
        "resident_bytes": 1,
        "expert_load": (1.5,),
        "dead_experts": (0,),
        "grad_norm": 0.8123,
        "learning_rate": 3e-4,
        "seconds": 1.0,
        "tokens_per_second": 8600.0,
        "flops_per_second": 240.1e12,
        "mfu": 0.243,
        "peak_bytes": int(26.47 * GIB),
        "seconds_by_term": {"forward": 1.0},
    }
    return StepLine(step=step, **(fields | values))


def test_the_step_line_is_in_the_order_that_people_grep_for():
    assert format_line(line(), 80 * GIB) == (
        "step:    10  loss:  1.55680  grad_norm:   0.8123  memory:  26.47GiB(33.09%)  tps:    8,600  "
        "tflops: 240.10  mfu: 24.3%"
    )


def test_a_slow_machine_sees_its_rate_too():
    assert "tflops: 0.00016  mfu" in format_line(line(flops_per_second=158.8e6), GIB)


def test_a_validation_stands_beside_the_loss():
    assert "grad_norm:   0.8123  validation:  1.62500  memory:" in format_line(line(validation_loss=1.625), GIB)


def test_a_number_that_is_not_finite_is_null_in_json(tmp_path):
    log = StepLog(tmp_path, GIB, 0, quiet=True)
    log.step(line(loss=float("nan"), grad_norm=float("inf")), LOADS)
    log.close()
    values = json.loads((tmp_path / STEPS_FILE).read_text())
    assert (values["loss"], values["grad_norm"], values["learning_rate"]) == (None, None, 3e-4)


def test_what_is_not_known_is_left_out_and_colour_is_only_for_terminals():
    plain = format_line(line(mfu=None, peak_bytes=None), GIB)
    assert "mfu" not in plain
    assert "memory" not in plain
    assert "\33" not in plain
    assert "\33[32mloss:  1.55680\33[0m" in format_line(line(), GIB, coloured=True)


def test_lines_for_people_go_to_stdout_unless_that_is_to_stay_clean(tmp_path, capsys):
    for quiet in (False, True):
        StepLog(tmp_path, GIB, 0, quiet=quiet).say("hello")
        shown = capsys.readouterr()
        assert (shown.out, shown.err) == (("", "hello\n") if quiet else ("hello\n", ""))


def test_a_resumed_run_goes_on_in_the_same_json_lines_without_repeating_a_step(tmp_path):
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = StepLog(tmp_path, GIB, first)
        for step in steps:
            log.step(line(step), step * LOADS)
        log.close()
    lines = [json.loads(text) for text in (tmp_path / STEPS_FILE).read_text().splitlines()]
    assert [each["step"] for each in lines] == [1, 2, 3, 4]
    assert lines[0]["seconds_by_term"] == {"forward": 1.0}
    trace = read_trace(str(tmp_path))
    assert np.array_equal(trace.load_WLE, np.arange(1, 5)[:, None, None] * LOADS), "`pipermoe balance` reads the folder"


@pytest.mark.parametrize(("first", "steps"), [(0, 1), (0, 2), (0, 3), (0, 4), (0, 100), (50, 53), (7, 8)])
def test_the_counted_step_is_not_timed_unless_there_is_no_other(first, steps):
    counted, measured = counted_step(first, steps), measured_steps(first, steps)
    assert first <= counted < steps
    assert len(measured) > 0
    assert counted not in measured or steps - first <= 3


def test_the_central_half_ignores_outliers_on_both_sides():
    assert sorted(central_half([5.0, 1.0, 99.0, 2.0, 3.0, 4.0, 0.0, 6.0])) == [0, 3, 4, 5]
    assert central_half([7.0]) == [0]


def test_terms_of_every_rank_add_up_to_the_step_and_an_outlier_does_not_count():
    def empty(rank: int) -> RankReport:
        memory = dict.fromkeys(MEMORY_CATEGORIES, 0)
        return RankReport(rank=rank, peak_bytes=1, memory_bytes=memory, flops=1, traffic={}, seconds={})

    fast = [StepSeconds(step, 1.0, {"forward": 0.25, "backward": 0.5}) for step in range(4)]
    slow = [StepSeconds(step, 90.0 if step == 2 else 2.0, {"forward": 1.0, "backward": 0.75}) for step in range(4)]
    report = step_report([empty(0), empty(1)], [fast, slow])
    assert report.step_seconds == 2.0
    assert [sum(rank.seconds.values()) for rank in report.ranks] == [2.0, 2.0]
    assert [rank.seconds["other"] for rank in report.ranks] == [1.25, 0.25]
    assert set(report.ranks[0].seconds) == set(TERMS)

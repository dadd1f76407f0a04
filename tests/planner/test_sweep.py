"""Every case of a sweep is the plan of that job, or says why there is none; the front is beaten by nothing."""

from itertools import pairwise

import pytest
from tests.resources.cases import MODEL, TRAIN, machine

from pipermoe.planner import find_plan
from pipermoe.planner.exact import exact_seconds
from pipermoe.planner.find import searched
from pipermoe.planner.pareto import STEP, pareto_front
from pipermoe.planner.sweep import compare_platforms, sweep


def test_a_case_is_the_plan_of_its_job():
    result = sweep(MODEL, machine(), TRAIN, {"ranks": [2, 7], "experts": [4, 8]})
    assert result.axes == ("ranks", "experts")
    assert [case.values for case in result.cases] == [{"ranks": g, "experts": e} for g in (2, 7) for e in (4, 8)]
    assert result.cases[1].best == find_plan(MODEL, machine(), TRAIN, world_size=2).chosen
    assert "ranks = 7" in result.cases[2].reason


def test_a_case_is_planned_for_the_runtime_that_is_asked_for():
    for compared in (
        sweep(MODEL, machine(), TRAIN, {"ranks": [2]}, runtime="megatron"),
        compare_platforms(MODEL, [machine()], TRAIN, [2], precision=TRAIN.precision, runtime="megatron"),
    ):
        assert compared.cases[0].best == find_plan(MODEL, machine(), TRAIN, world_size=2, runtime="megatron").chosen
    [refused] = sweep(MODEL, machine(), TRAIN, {"ranks": [2]}, runtime="torchtitan").cases
    assert "torchtitan 0.3.0: registers" in refused.reason


def test_machines_are_compared_on_the_same_job():
    slow = machine(compute_slots=1).model_copy(update={"name": "slow"})
    result = compare_platforms(MODEL, [machine(), slow], TRAIN, [4])
    fast, shared = result.cases
    assert fast.best is not None
    assert shared.best is not None
    assert fast.tokens_per_second_per_rank > shared.tokens_per_second_per_rank
    assert [case.values["platform"] for case in result.cases] == ["machine", "slow"]


@pytest.mark.slow
def test_no_strategy_beats_a_point_of_the_front_in_time_and_memory():
    train = TRAIN.model_copy(update={"global_batch_size": 4})
    field = searched(MODEL, machine(), train, 4)
    front = pareto_front(field)
    assert len(front) > 1
    everything = field.best(field.space.count(field.space.select())).best
    for point in front:
        assert not [s for s in everything if s.seconds < point.step_seconds and s.peak_bytes <= point.peak_bytes]
        assert exact_seconds(field.job, point.strategy) == point.step_seconds
    for fast, small in pairwise(front):
        assert small.step_seconds >= fast.step_seconds
        assert small.peak_bytes <= (1 - STEP) * fast.peak_bytes

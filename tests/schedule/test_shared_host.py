"""Ranks that share cores: exactly the ordinary timeline with enough of them, and total work over cores with too few."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.schedule.grids import SLOWLY, pipelines

from pipermoe.schedule.action import Action, Kind, Schedule
from pipermoe.schedule.builders import build
from pipermoe.schedule.communication import with_communication
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.shared_host import simulate_shared_host
from pipermoe.schedule.timeline import simulate

F, B = Kind.FORWARD, Kind.BACKWARD


@SLOWLY
@given(st.data(), pipelines(most_ranks=4, most_microbatches=8), st.integers(1, 3))
def test_enough_cores_give_the_ordinary_timeline_exactly(data, schedule, width):
    seconds = st.floats(0.001, 10.0)
    values = st.lists(seconds, min_size=schedule.num_stages, max_size=schedule.num_stages)
    kinds = ("forward", "input_grad", "weight_grad", "forward_exchange", "backward_exchange", "transfer")
    times = Durations(**{kind: data.draw(values) for kind in kinds})
    for form in (schedule, with_communication(schedule)):
        assert simulate_shared_host(form, times, form.num_ranks * width, width) == simulate(form, times)


@pytest.mark.parametrize(("slots", "step"), [(4, 27.0), (3, 34.0), (2, 48.0), (1, 96.0)])
def test_a_bubble_costs_nothing_while_the_cores_are_busy(slots, step):
    """2 pipeline ranks of 2 processes, 8 micro-batches: 96 s of work; alone 1F1B would take (8 + 1) * 3 = 27 s."""
    assert simulate_shared_host(build("1f1b", 2, 8), Durations(), slots, 2).step_seconds == step


def test_two_computing_ranks_share_one_core_equally():
    work = [[Action(F, 0, 0), Action(B, 0, 0)], [Action(F, 1, 0), Action(B, 1, 0)]]
    apart = Schedule.of("apart", 1, (0, 1), work)
    timeline = simulate_shared_host(apart, Durations([2.0, 1.0], [2.0, 1.0], 0.0), 1)
    assert timeline.end == ((2.0, 6.0), (3.0, 4.0))  # a chain: nothing to share
    both = simulate_shared_host(build("gpipe", 2, 2), Durations(1.0, 1.0, 0.0), 1)
    assert both.end[0][:2] == (1.0, 3.0)  # the second forward shares the core with stage 1's first
    assert both.end[1][:2] == (3.0, 4.0)


def test_all_to_alls_are_not_stretched():
    times = Durations(1.0, 1.0, 0.0, forward_exchange=4.0, backward_exchange=4.0)
    timeline = simulate_shared_host(build("gpipe", 1, 1), times, 1, ranks_per_stage=2)
    assert timeline.end == ((6.0, 12.0),)  # 2 processes on one core: 2 s of computing, then 4 s of all-to-all


@SLOWLY
@given(pipelines(most_ranks=4, most_microbatches=8), st.integers(1, 4))
def test_no_order_beats_the_cores(schedule, slots):
    timeline = simulate_shared_host(schedule, Durations(), slots)
    assert timeline.step_seconds * slots >= sum(timeline.compute_seconds) * (1 - 1e-12)
    assert timeline.step_seconds >= simulate(schedule).step_seconds * (1 - 1e-12)

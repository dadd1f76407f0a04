"""Lowering to sends and receives: the exact order, no loss of time, and no hang with blocking calls."""

import pytest
from hypothesis import given
from tests.schedule.grids import SLOWLY, pipelines, virtual_stages

from pipermoe.schedule.action import RECEIVES, SENDS
from pipermoe.schedule.builders import RECIPES, build
from pipermoe.schedule.communication import matching_receive, with_communication, without_communication
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.timeline import simulate


def test_1f1b_receives_right_before_use_unless_both_would_send_first():
    assert str(with_communication(build("1f1b", 2, 3))) == (
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0F2 0SEND_F2 0RECV_B1 0B1 0RECV_B2 0B2\n"
        "1RECV_F0 1F0 1B0 1RECV_F1 1SEND_B0 1F1 1B1 1RECV_F2 1SEND_B1 1F2 1B2 1SEND_B2"
    )


def test_stages_on_one_rank_exchange_nothing():
    assert with_communication(build("zb-v", 1, 3, 2)) == build("zb-v", 1, 3, 2)
    middle = with_communication(build("zb-v", 2, 3, 2)).ranks[1]  # holds stages 1 and 2
    assert {str(action)[:-1] for action in middle if action.kind in SENDS} == {"1SEND_B", "2SEND_F"}


@SLOWLY
@given(pipelines())
def test_every_send_has_its_receive_and_nothing_else_changes(schedule):
    lowered = with_communication(schedule)
    actions = [action for rank in lowered.ranks for action in rank]
    sends = {matching_receive(action) for action in actions if action.kind in SENDS}
    assert sends == {action for action in actions if action.kind in RECEIVES}
    assert without_communication(lowered) == schedule
    assert with_communication(lowered) == lowered


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("p", [2, 4, 5])
def test_blocking_receives_cost_no_time_when_stages_are_alike(name, p):
    if p % RECIPES[name].ranks_step == 0:
        schedule = build(name, p, 4 * p, virtual_stages(name))
        lowered = with_communication(schedule)
        assert simulate(lowered).step_seconds == simulate(schedule).step_seconds


@pytest.mark.parametrize("name", RECIPES)
def test_blocking_receives_cost_little_when_transfers_take_time(name):
    schedule, times = build(name, 4, 12, virtual_stages(name)), Durations(1.0, 1.25, 1.0, transfer=0.03125)
    free, blocking = (simulate(s, times).step_seconds for s in (schedule, with_communication(schedule)))
    assert free <= blocking <= 1.05 * free

"""When a rank knows that a send has arrived."""

from __future__ import annotations

import pytest

from pipermoe.schedule.action import SENDS
from pipermoe.schedule.arrivals import acknowledgements
from pipermoe.schedule.builders import build
from pipermoe.schedule.communication import with_communication


def settled(name: str, ranks: int, microbatches: int, rank: int) -> dict[str, list[str]]:
    schedule = with_communication(build(name, ranks, microbatches))
    return {str(receive): list(map(str, sends)) for receive, sends in acknowledgements(schedule, rank).items()}


def test_a_gradient_that_comes_back_proves_that_its_activation_had_arrived():
    """Rank 1 does RECV_F0 F0 B0 RECV_F1 SEND_B0 ...: its first gradient proves two activations."""
    assert settled("1f1b", 2, 3, rank=0) == {"0RECV_B0": ["0SEND_F0", "0SEND_F1"], "0RECV_B1": ["0SEND_F2"]}


def test_an_activation_proves_that_earlier_gradients_had_arrived():
    assert settled("1f1b", 2, 4, rank=1) == {"1RECV_F2": ["1SEND_B0"], "1RECV_F3": ["1SEND_B1"]}


def test_gpipe_s_first_gradient_proves_every_activation():
    """Rank 1 of 3 has sent all activations on before the first gradient comes back, which proves both of its sends."""
    assert settled("gpipe", 3, 2, rank=1)["1RECV_B0"] == ["1SEND_F0", "1SEND_F1"]


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1"])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_no_send_settles_twice_or_before_it_is_sent(name: str, rank: int):
    schedule = with_communication(build(name, 4, 8))
    actions = list(schedule.parts(rank))
    seen = set()
    for receive, sends in acknowledgements(schedule, rank).items():
        for send in sends:
            assert send.kind in SENDS
            assert actions.index(send) < actions.index(receive)
            assert send not in seen
            seen.add(send)


def test_1f1b_keeps_few_sends_open_however_long_it_runs():
    schedule = with_communication(build("1f1b", 4, 64))
    for rank in range(4):
        arrived, waiting, most = acknowledgements(schedule, rank), 0, 0
        for action in schedule.parts(rank):
            waiting += action.kind in SENDS
            most = max(most, waiting)
            waiting -= len(arrived.get(action, ()))
        assert most <= 2 * 4

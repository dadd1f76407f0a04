"""What closes a lifeline: the end of its process, not a goodbye."""

from __future__ import annotations

import socket
import time

import pytest

from pipermoe.training.lifelines import Lifelines


def held(lines: Lifelines) -> list[int]:
    """The ranks at the other ends."""
    return [key.data for key in lines._ends.get_map().values() if key.data is not None]


def told_when(lines: Lifelines, ends: list[int]) -> list[int]:
    """What it tells once it holds these ends, however late the system delivers what has been sent."""
    limit = time.monotonic() + 30
    told = lines.ended()
    while held(lines) != ends and time.monotonic() < limit:
        told = lines.ended()
    assert held(lines) == ends
    return told


@pytest.fixture
def tied():
    """The ends of the first rank and of rank 5; the first has accepted."""
    first, other = Lifelines(), Lifelines()
    other.connect(5, "localhost", *first.listen(8))
    assert told_when(first, [5]) == []
    yield first, other
    for lines in (first, other):
        lines.close()


def end_the_process(lines: Lifelines) -> None:
    """What the system does: close every connection."""
    for key in list(lines._ends.get_map().values()):
        assert isinstance(key.fileobj, socket.socket)
        lines._ends.unregister(key.fileobj)
        key.fileobj.close()


def test_an_end_without_a_goodbye_is_told_by_rank(tied):
    first, other = tied
    end_the_process(other)
    assert told_when(first, []) == [5]
    assert first.ended(for_seconds=3600) == []  # not yet so long ago


def test_the_others_learn_that_the_first_has_ended(tied):
    first, other = tied
    assert other.ended() == []
    end_the_process(first)
    assert told_when(other, []) == [0]


@pytest.mark.parametrize("parting", [0, 1])
def test_whoever_says_goodbye_has_not_ended(parting):
    both = Lifelines(), Lifelines()
    both[1].connect(5, "localhost", *both[0].listen(8))
    assert told_when(both[0], [5]) == []
    both[parting].close()
    assert told_when(both[1 - parting], []) == []
    both[1 - parting].close()


def test_every_rank_that_calls_is_held():
    first, others = Lifelines(), [Lifelines() for _ in range(4)]
    address = first.listen(5)
    for rank, other in enumerate(others, 1):
        other.connect(rank, "localhost", *address)
    assert told_when(first, [1, 2, 3, 4]) == []
    for each in (first, *others):
        each.close()


def test_a_stranger_is_turned_away():
    first, stranger = Lifelines(), Lifelines()
    port, _ = first.listen(8)
    stranger.connect(5, "localhost", port, "0" * 32)
    told_when(stranger, [0])
    limit = time.monotonic() + 30
    while held(stranger) and time.monotonic() < limit:
        assert first.ended() == []
        stranger.ended()
    assert held(stranger) == held(first) == []
    first.close()
    stranger.close()


def test_without_a_listener_nothing_is_known():
    with socket.create_server(("localhost", 0)) as closed:
        port = closed.getsockname()[1]
    other = Lifelines()
    other.connect(5, "localhost", port, "0" * 32)
    assert other.ended() == []
    other.close()

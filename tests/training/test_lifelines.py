"""What closes a lifeline: the end of its process, not a goodbye."""

from __future__ import annotations

import socket

from pipermoe.training.lifelines import Lifelines


def tied(rank: int) -> tuple[Lifelines, Lifelines]:
    """The ends of the first rank and of `rank`; the first has accepted."""
    first, other = Lifelines(), Lifelines()
    other.connect(rank, "localhost", first.listen(8))
    assert first.ended() == []
    return first, other


def end_the_process(lines: Lifelines) -> None:
    """What the system does: close every connection."""
    for key in list(lines._ends.get_map().values()):
        assert isinstance(key.fileobj, socket.socket)
        key.fileobj.close()


def test_an_end_without_a_goodbye_is_told_by_rank():
    first, other = tied(5)
    end_the_process(other)
    assert first.ended() == [5]
    assert first.ended(for_seconds=3600) == []  # not yet so long ago
    first.close()


def test_the_others_learn_that_the_first_has_ended():
    first, other = tied(5)
    assert other.ended() == []
    end_the_process(first)
    assert other.ended() == [0]


def test_whoever_says_goodbye_has_not_ended():
    first, other = tied(5)
    other.close()
    assert first.ended() == []
    first, other = tied(5)
    first.close()
    assert other.ended() == []
    other.close()


def test_without_a_listener_nothing_is_known():
    with socket.create_server(("localhost", 0)) as closed:
        port = closed.getsockname()[1]
    other = Lifelines()
    other.connect(5, "localhost", port)
    assert other.ended() == []
    other.close()

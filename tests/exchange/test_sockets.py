"""Sockets of our own: bytes in order, strangers turned away, silence reported."""

import socket
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from pipermoe.exchange.host.sockets import Sockets
from pipermoe.specs.errors import MachineError


@pytest.fixture
def both(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with connectable(timeout=60) as pair:
        yield pair


@contextmanager
def connectable(timeout):
    pair = [Sockets(rank, b"s" * 16, timeout) for rank in range(2)]
    for end in pair:
        end.listen()
    for end in pair:
        end.addresses = [other.address for other in pair]
    yield pair
    for end in pair:
        end.close()


def connect(both):
    both[0].connect({1})
    both[1].connect({0})


def until(end, message):
    done = []
    while message not in done:
        done += end.wait(0.1)
    return done


def test_bytes_arrive_in_order_whatever_the_cuts(both):
    connect(both)
    sent, got = np.arange(1000, dtype=np.uint8), np.zeros(1000, dtype=np.uint8)
    assert both[0].send(1, 0, sent[:700])
    assert both[0].send(1, 1, sent[700:])
    both[1].expect(0, 10, got[:10])
    both[1].expect(0, 11, got[10:])
    assert until(both[1], 11) == [10, 11]
    assert (got == sent).all()


def test_both_sides_may_send_more_than_any_buffer_holds_before_either_reads(both):
    connect(both)
    big = [np.full(20_000_000, rank, dtype=np.uint8) for rank in range(2)]
    got = [np.zeros_like(big[0]) for _ in range(2)]

    def exchange(me, other):
        both[me].expect(other, 0, got[me])
        left = {0, 1} if not both[me].send(other, 1, big[me]) else {0}
        while left:
            left -= set(both[me].wait(0.1))

    threads = [threading.Thread(target=exchange, args=(me, 1 - me)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (got[0] == 1).all()
    assert (got[1] == 0).all()


def test_a_stranger_is_turned_away(both):
    stranger = socket.create_connection(both[1].address)
    stranger.sendall(bytes(8) + b"wrong secret....")
    connect(both)
    assert both[1].connections.keys() == {0}
    both[0].send(1, 0, np.full(4, 7, dtype=np.uint8))
    got = np.zeros(4, dtype=np.uint8)
    both[1].expect(0, 0, got)
    until(both[1], 0)
    assert got.tolist() == [7] * 4
    stranger.close()


def test_silence_is_an_error(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with (
        connectable(timeout=0.2) as (_, silent),
        pytest.raises(MachineError, match=r"rank 1: rank 0 has not connected within 0\.2 s"),
    ):
        silent.connect({0})


def test_a_closed_connection_is_an_error(both):
    connect(both)
    both[0].close()
    both[1].expect(0, 0, np.zeros(2, dtype=np.uint8))
    with pytest.raises(MachineError, match="rank 1: receiving from rank 0 failed: the connection was closed"):
        until(both[1], 0)

"""Sockets of our own: bytes in order, strangers turned away, silence reported."""

import socket
import threading

import numpy as np
import pytest

from pipermoe.exchange.wire import Wire
from pipermoe.specs.errors import MachineError


@pytest.fixture
def wires(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    pair = [Wire(rank, b"s" * 16, timeout=0.2) for rank in range(2)]
    for wire in pair:
        wire.peers = [other.address for other in pair]
    yield pair
    for wire in pair:
        wire.close()


def receive(wire, peer, length):
    into = np.zeros(length, dtype=np.uint8)
    wire.wait(wire.expect(peer, into), peer)
    return into


def test_bytes_arrive_in_order_whatever_the_cuts(wires):
    sent = np.arange(1000, dtype=np.uint8)
    wires[0].send(1, sent[:700])
    wires[0].send(1, sent[700:])
    got = np.concatenate([receive(wires[1], 0, 10), receive(wires[1], 0, 990)])
    assert (got == sent).all()


def test_both_sides_may_send_more_than_any_buffer_holds_before_either_reads(wires):
    big = [np.full(20_000_000, rank, dtype=np.uint8) for rank in range(2)]
    got = [np.zeros_like(big[0]) for _ in range(2)]

    def exchange(me, other):
        arrival = wires[me].expect(other, got[me])
        wires[me].send(other, big[me])
        wires[me].wait(arrival, other)
        wires[me].flush()

    threads = [threading.Thread(target=exchange, args=(me, 1 - me)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (got[0] == 1).all()
    assert (got[1] == 0).all()
    assert not wires[0].busy


def test_a_stranger_is_turned_away(wires):
    stranger = socket.create_connection(wires[1].address)
    stranger.sendall(bytes(8) + b"wrong secret...." + b"poison")
    wires[0].send(1, np.full(4, 7, dtype=np.uint8))
    assert receive(wires[1], 0, 4).tolist() == [7] * 4
    stranger.close()


def test_silence_and_a_closed_connection_are_errors(wires):
    with pytest.raises(MachineError, match=r"rank 1: receiving from rank 0 failed: nothing within 0\.2 s"):
        receive(wires[1], 0, 1)
    wires[0].send(1, np.zeros(1, dtype=np.uint8))
    wires[0].close()
    with pytest.raises(MachineError, match="closed"):
        receive(wires[1], 0, 2)

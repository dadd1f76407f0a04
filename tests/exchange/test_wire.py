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


def test_bytes_arrive_in_order_whatever_the_cuts(wires):
    sent = np.arange(1000, dtype=np.uint8)
    wires[0].send(1, sent[:700])
    wires[0].send(1, sent[700:])
    got = np.zeros(1000, dtype=np.uint8)
    wires[1].receive(0, got[:10])
    wires[1].receive(0, got[10:])
    assert (got == sent).all()


def test_a_stranger_is_turned_away(wires):
    stranger = socket.create_connection(wires[1].address)
    stranger.sendall(bytes(8) + b"wrong secret...." + b"poison")
    sender = threading.Thread(target=wires[0].send, args=(1, np.full(4, 7, dtype=np.uint8)))
    sender.start()
    got = np.zeros(4, dtype=np.uint8)
    wires[1].receive(0, got)
    sender.join()
    stranger.close()
    assert got.tolist() == [7] * 4


def test_silence_and_a_closed_connection_are_errors(wires):
    with pytest.raises(MachineError, match=r"rank 1: receiving from rank 0 failed: nothing within 0\.2 s"):
        wires[1].receive(0, np.zeros(1, dtype=np.uint8))
    wires[0].send(1, np.zeros(1, dtype=np.uint8))
    with pytest.raises(MachineError, match="nothing within"):
        wires[1].receive(0, np.zeros(2, dtype=np.uint8))
    wires[0].close()
    with pytest.raises(MachineError, match="closed"):
        wires[1].receive(0, np.zeros(2, dtype=np.uint8))

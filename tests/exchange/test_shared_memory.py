"""Ranks of a node that have nothing to say to each other may be several exchanges apart; no bytes are lost by it."""

import numpy as np
import pytest
import torch

from pipermoe.exchange.builders import BUILDERS
from pipermoe.exchange.executor.transport import HostTransport
from pipermoe.exchange.host import native, shared_memory
from pipermoe.exchange.host.shared_memory import SharedNode
from pipermoe.exchange.host.sockets import Sockets
from pipermoe.exchange.topology import Topology

pytestmark = pytest.mark.skipif(not shared_memory.available(), reason="needs Linux on x86-64 and /dev/shm")
RANKS = 3


@pytest.fixture(params=["native", "python"])
def ranks(request, tmp_path):
    """The transports of the ranks of one node, all in this process: each moves only when it is told to."""
    if request.param == "native" and not native.build():
        pytest.skip("needs a C compiler")
    nodes = [SharedNode(f"pipermoe-test-{tmp_path.name}-{request.param}", rank, RANKS) for rank in range(RANKS)]
    for step in (SharedNode.create, SharedNode.attach, SharedNode.unlink):
        for node in nodes:
            step(node)
    topology = Topology.even(1, RANKS)
    wires = [Sockets(rank, b"s" * 16, timeout=10) for rank in range(RANKS)]
    together = [HostTransport(r, topology, nodes[r], wires[r], request.param == "native") for r in range(RANKS)]
    yield together
    for transport in together:
        transport.close()


def exchange(ranks, rank, counts, value):
    """This rank's part: what it receives when everything that it sends has this value."""
    plan = BUILDERS["direct"](counts, ranks[rank].topology)
    sent = torch.full((int(counts[rank].sum()),), value, dtype=torch.uint8)
    received = torch.zeros(int(counts[:, rank].sum()), dtype=torch.uint8)
    ranks[rank].run(ranks[rank].prepare(plan), (sent, received, torch.empty(0, dtype=torch.uint8)))
    return received.tolist()


def from_to(source, destination, size):
    counts = np.zeros((RANKS, RANKS), dtype=np.int64)
    counts[source, destination] = size
    return counts


@pytest.mark.parametrize("size", [1, 100, 1_000_000])
def test_a_rank_that_runs_ahead_writes_over_nothing_that_others_have_not_read(ranks, size):
    first, second, third = from_to(0, 1, size), from_to(0, 1, size), from_to(2, 1, size)
    exchange(ranks, 0, first, value=1)
    for counts, value in ((first, 0), (second, 0), (third, 3)):  # the third uses the half that the first used
        exchange(ranks, 2, counts, value)
    assert exchange(ranks, 1, first, value=0) == [1] * size


@pytest.mark.parametrize("size", [1, 100, 1_000_000])
def test_a_rank_that_lags_writes_over_nothing_that_others_have_written(ranks, size):
    first, second, third = from_to(0, 1, size), from_to(0, 1, size), from_to(2, 0, size)
    for counts, value in ((first, 0), (second, 0), (third, 3)):
        exchange(ranks, 2, counts, value)
    exchange(ranks, 0, first, value=1)
    assert exchange(ranks, 1, first, value=0) == [1] * size
    exchange(ranks, 0, second, value=2)
    assert exchange(ranks, 1, second, value=0) == [2] * size
    assert exchange(ranks, 0, third, value=0) == [3] * size


def test_the_memory_of_one_rank_grows_while_others_still_read_the_old(ranks):
    small, large = from_to(0, 1, 10), from_to(0, 1, 300_000)
    for counts, value in ((small, 1), (small, 2), (large, 3), (large, 4)):
        exchange(ranks, 2, counts, value)
    exchange(ranks, 0, small, value=1)
    exchange(ranks, 0, small, value=2)
    assert exchange(ranks, 1, small, value=0) == [1] * 10
    exchange(ranks, 0, large, value=3)
    assert exchange(ranks, 1, small, value=0) == [2] * 10
    assert exchange(ranks, 1, large, value=0) == [3] * 300_000

"""The price of a plan against the bound and the simulation."""

from dataclasses import replace

import numpy as np
import pytest

from pipermoe.exchange import cost
from pipermoe.exchange.builders import BUILDERS
from pipermoe.exchange.simulate import simulate
from pipermoe.exchange.topology import Topology

LINKS = Topology.even(
    16,
    4,
    groups=4,
    nics_per_node=2,
    nic_bandwidth=1e9,
    local_bandwidth=4e9,
    global_bandwidth=2e9,
    local_latency=1e-6,
    nic_latency=2e-6,
    global_latency=1e-6,
    message_seconds=1e-7,
)


def test_the_limit_counts_nodes_and_group_pairs():
    counts = np.zeros((64, 64), dtype=np.int64)
    counts[0, 60] = 4_000_000  # both NICs may carry it: 2 ms; the group link carries it in 2 ms as well
    assert cost.limit_seconds(counts, LINKS) == pytest.approx(0.002)
    counts[0, 1] = 10**9  # stays inside the node
    assert cost.limit_seconds(counts, LINKS) == pytest.approx(0.002)


@pytest.mark.parametrize("name", BUILDERS)
def test_no_plan_is_priced_or_simulated_below_the_limit(name):
    generator = np.random.default_rng(1)
    node, nic = LINKS.node[::3], LINKS.nic[::3]  # one rank on some nodes, two on others
    topology = replace(LINKS, node=node, nic=nic)
    counts = generator.integers(0, 10_000, (22, 22))
    plan = BUILDERS[name](counts, topology)
    bound = cost.limit_seconds(counts, topology)
    assert cost.plan_seconds(plan, topology) >= bound
    assert simulate(plan, topology, resolution=bound / 100).seconds >= bound * 0.98


def test_skew_is_cheaper_when_all_nics_share_it():
    counts = np.zeros((64, 64), dtype=np.int64)
    counts[:, 60] = 100_000
    prices = {name: cost.plan_seconds(BUILDERS[name](counts, LINKS), LINKS) for name in ("direct", "nic_balanced")}
    assert prices["nic_balanced"] < 0.7 * prices["direct"]

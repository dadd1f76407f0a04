"""Closed forms against the bound, the simulation and each other."""

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
SHAPE = (64, 4, 2, 4, LINKS)


def test_the_limit_counts_nodes_and_group_pairs():
    counts = np.zeros((64, 64), dtype=np.int64)
    counts[0, 60] = 4_000_000  # both NICs may carry it: 2 ms; the group link carries it in 2 ms as well
    assert cost.limit_seconds(counts, LINKS) == pytest.approx(0.002)
    counts[0, 1] = 10**9  # stays inside the node
    assert cost.limit_seconds(counts, LINKS) == pytest.approx(0.002)


@pytest.mark.parametrize("name", BUILDERS)
def test_no_plan_is_priced_or_simulated_below_the_limit(name):
    generator = np.random.default_rng(1)
    topology = LINKS.subset(range(0, 64, 3))
    counts = generator.integers(0, 10_000, (22, 22))
    plan = BUILDERS[name](counts, topology)
    bound = cost.limit_seconds(counts, topology)
    assert cost.plan_seconds(plan, topology) >= bound
    assert simulate(plan, topology, resolution=bound / 100).seconds >= bound * 0.98


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("direct", cost.regular_direct_seconds),
        ("pairwise", cost.regular_pairwise_seconds),
        ("hierarchical", cost.regular_hierarchical_seconds),
        ("log_step", cost.regular_log_step_seconds),
    ],
)
@pytest.mark.parametrize("bytes_per_pair", [64, 1 << 16])
def test_regular_formulas_follow_the_price_of_the_plan(name, formula, bytes_per_pair):
    plan = BUILDERS[name](np.full((64, 64), bytes_per_pair), LINKS)
    assert formula(bytes_per_pair, *SHAPE) == pytest.approx(cost.plan_seconds(plan, LINKS), rel=0.45)


def test_regular_formulas_take_arrays():
    sizes = np.array([1e3, 1e6])[:, None]
    ranks = np.array([8, 64, 512])
    for formula in (
        cost.regular_limit_seconds,
        cost.regular_direct_seconds,
        cost.regular_pairwise_seconds,
        cost.regular_hierarchical_seconds,
        cost.regular_log_step_seconds,
    ):
        table = formula(sizes, ranks, 4, 2, 4, LINKS)
        assert table.shape == (2, 3)
        assert table[1, 2] == formula(1e6, 512, 4, 2, 4, LINKS)
        assert (table >= cost.regular_limit_seconds(sizes, ranks, 4, 2, 4, LINKS)).all()


def test_few_bytes_cost_messages_and_many_bytes_cost_bandwidth():
    small = {f.__name__: f(16.0, *SHAPE) for f in (cost.regular_direct_seconds, cost.regular_hierarchical_seconds)}
    assert small["regular_hierarchical_seconds"] < small["regular_direct_seconds"]
    large = {f.__name__: f(1e7, *SHAPE) for f in (cost.regular_direct_seconds, cost.regular_log_step_seconds)}
    assert large["regular_direct_seconds"] < large["regular_log_step_seconds"]


def test_skew_is_cheaper_when_all_nics_share_it():
    counts = np.zeros((64, 64), dtype=np.int64)
    counts[:, 60] = 100_000
    prices = {name: cost.plan_seconds(BUILDERS[name](counts, LINKS), LINKS) for name in ("direct", "nic_balanced")}
    assert prices["nic_balanced"] < 0.7 * prices["direct"]

"""Closed forms of even all-to-alls against the prices of their plans, and on platforms."""

import numpy as np
import pytest
from tests.resources.cases import machine

from pipermoe.exchange import cost, regular
from pipermoe.exchange.builders import BUILDERS
from pipermoe.exchange.regular import Links
from pipermoe.exchange.topology import Topology
from pipermoe.resources.rates import collective_seconds
from pipermoe.specs.network import Level, Link
from pipermoe.specs.spread import Spread

SPEEDS = {
    "nic_bandwidth": 1e9,
    "local_bandwidth": 4e9,
    "global_bandwidth": 2e9,
    "local_latency": 1e-6,
    "nic_latency": 2e-6,
    "global_latency": 1e-6,
    "message_seconds": 1e-7,
}
TOPOLOGY = Topology.even(16, 4, groups=4, nics_per_node=2, **SPEEDS)
LINKS = Links(ranks_per_node=4, nics_per_node=2, ranks_per_group=16, **SPEEDS)
FORMULAS = {
    "direct": regular.direct_seconds,
    "hierarchical": regular.hierarchical_seconds,
    "log_step": regular.log_step_seconds,
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("bytes_per_pair", [64, 1 << 16])
def test_a_formula_follows_the_price_of_the_plan(name, bytes_per_pair):
    plan = BUILDERS[name](np.full((64, 64), bytes_per_pair), TOPOLOGY)
    assert FORMULAS[name](bytes_per_pair, 64, LINKS) == pytest.approx(cost.plan_seconds(plan, TOPOLOGY), rel=0.45)


@pytest.mark.parametrize("formula", FORMULAS.values())
def test_formulas_take_arrays_and_keep_to_the_limit(formula):
    sizes, ranks = np.array([1e3, 1e6])[:, None], np.array([8, 64, 512])
    table = formula(sizes, ranks, LINKS)
    assert table.shape == (2, 3)
    assert table[1, 2] == formula(1e6, 512, LINKS)
    assert (table >= regular.limit_seconds(sizes, ranks, LINKS)).all()


def test_the_limit_is_that_of_the_byte_matrix():
    counts = np.full((64, 64), 1000)
    assert regular.limit_seconds(1000, 64, LINKS) == pytest.approx(cost.limit_seconds(counts, TOPOLOGY))


def test_few_bytes_cost_messages_and_many_bytes_cost_bandwidth():
    assert regular.hierarchical_seconds(16.0, 64, LINKS) < regular.direct_seconds(16.0, 64, LINKS)
    assert regular.direct_seconds(1e7, 64, LINKS) < regular.log_step_seconds(1e7, 64, LINKS)


def frontier_like(nodes_per_group, taper):
    """8 ranks a node at 50 GB/s inside, 4 NICs of 25 GB/s, groups of nodes joined by tapered links."""
    link = lambda topology, bandwidth, **rest: Link(  # noqa: E731
        topology=topology, bandwidth_bytes_per_s=bandwidth, latency_seconds=2e-6, **rest
    )
    levels = (
        Level(name="node", ranks=8, link=link("fully_connected", 50e9)),
        Level(name="group", ranks=8 * nodes_per_group, link=link("dragonfly", 25e9, shared_by=2)),
        Level(name="machine", ranks=64 * nodes_per_group, link=link("dragonfly", 25e9, shared_by=2, taper=taper)),
    )
    return machine(64 * nodes_per_group).model_copy(update={"levels": levels})


def test_on_a_platform_a_group_has_its_share_of_nics_and_global_links():
    platform = frontier_like(nodes_per_group=4, taper=0.5)
    links = regular.links_of(platform, np.array([8, 32, 64, 64]), np.array([8, 32, 64, 256]))
    assert links.ranks_per_node.tolist() == [8, 8, 8, 2]
    assert links.nics_per_node.tolist() == [4, 4, 4, 1]
    assert (links.nics_per_node * links.nic_bandwidth / links.ranks_per_node).tolist() == [12.5e9] * 4
    # 64 ranks in 2 groups of 32, each of which sends 32 x 32 pairs' bytes at 6.25 GB/s a rank
    assert regular.limit_seconds(1e6, 64, links)[2] == pytest.approx(32 * 32e6 / (32 * 6.25e9))


def test_a_planned_exchange_on_a_platform_takes_the_cheapest_plan():
    platform = frontier_like(nodes_per_group=4, taper=1.0)
    ranks, moved = np.array([1, 16]), np.array([1e6, 15e6])
    alone, pair = regular.planned_seconds(platform, ranks, ranks, moved)
    assert alone == 0
    assert pair == pytest.approx(8 * 8 * 1e6 / 100e9 + 2e-6)  # nothing but the NICs and one latency
    measured = machine(4)
    library = collective_seconds(measured, "all_to_all", Spread(4, 4), 3e6)
    assert regular.planned_seconds(measured, 4, 4, 3e6) <= library + 1e-12

"""Costs that follow from a description of links: bytes over the slowest port, in each collective's own way."""

import pytest
from tests.resources.cases import machine

from pipermoe.resources.rates import collective_seconds, grouped_rate_at, sent_share
from pipermoe.specs.device import GroupedCurve
from pipermoe.specs.network import Level, Link, links_per_rank
from pipermoe.specs.platform_file import load_platform
from pipermoe.specs.spread import Spread


def two_level(**nic):
    """Nodes of 4 ranks at 100 GB/s inside, one 25 GB/s NIC for 2 ranks between them; no latency."""
    inside = Link(topology="fully_connected", bandwidth_bytes_per_s=100e9, latency_seconds=0)
    between = Link(topology="fat_tree", bandwidth_bytes_per_s=25e9, latency_seconds=0, shared_by=2, **nic)
    levels = (Level(name="node", ranks=4, link=inside), Level(name="cluster", ranks=16, link=between))
    return machine().model_copy(update={"levels": levels})


def test_an_all_to_all_waits_for_the_part_that_leaves_the_node():
    seconds = collective_seconds(two_level(), "all_to_all", Spread(8, 8), 7e9)  # 4 of 7 peers are on the other node
    assert seconds == pytest.approx(4e9 / 12.5e9)


def test_a_ring_crosses_the_nics_of_all_ranks_of_a_node():
    platform = two_level()
    assert collective_seconds(platform, "all_gather", Spread(8, 8), 8e9) == pytest.approx(
        8e9 * (1 - 4 / 8) / 4 / 12.5e9
    )
    assert collective_seconds(platform, "all_reduce", Spread(8, 8), 8e9) == pytest.approx(2 * 1e9 / 12.5e9)


def test_ranks_one_per_node_use_only_their_own_port():
    seconds = collective_seconds(two_level(), "all_gather", Spread(2, 8), 8e9)  # every fourth rank
    assert seconds == pytest.approx(8e9 / 2 / 12.5e9)


def test_a_taper_narrows_the_way_out():
    plain, tapered = (collective_seconds(two_level(taper=t), "all_to_all", Spread(8, 8), 7e9) for t in (1.0, 0.5))
    assert tapered == pytest.approx(2 * plain)


def test_a_group_inside_a_node_never_meets_the_network():
    assert collective_seconds(two_level(), "all_to_all", Spread(4, 4), 3e9) == pytest.approx(3e9 / 100e9)


def test_the_bytes_of_a_ring_are_those_of_the_textbook():
    assert sent_share("all_gather", 8.0, 1.0, 8.0) == pytest.approx(7 / 8)
    assert sent_share("all_reduce", 8.0, 1.0, 8.0) == pytest.approx(14 / 8)


def test_a_ring_of_single_links_gives_what_its_bisection_allows():
    ring = tuple((r, (r + 1) % 4, 1) for r in range(4))
    assert links_per_rank(ring, 4) == pytest.approx(3 / 2)  # 3 messages, 4 hops of them over 2 links out of each rank


def test_a_full_mesh_gives_every_link():
    assert links_per_rank(tuple((a, b, 1) for a in range(8) for b in range(a)), 8) == pytest.approx(7)


@pytest.mark.parametrize(("ep", "measured"), [(8, 1265e-6), (16, 5774e-6), (32, 8059e-6), (64, 9164e-6)])
def test_the_h100_exchanges_as_published(ep, measured):  # NCCL dispatch, arXiv 2603.07685, table 7
    leaving = 4096 * 8 * 7168 * 2 * (ep - 1) / ep
    assert collective_seconds(load_platform("dgx-h100"), "all_to_all", Spread(ep, ep), leaving) == pytest.approx(
        measured, rel=0.05
    )


def test_rates_of_experts_between_two_widths_lie_between_them():
    curves = [GroupedCurve(width=w, size=(1.0,), rate=(r,)) for w, r in ((512, 1e12), (2048, 3e12))]
    assert grouped_rate_at(curves, 64, 1024) == pytest.approx(2e12)
    assert grouped_rate_at(curves, 64, 64) == pytest.approx(1e12)
    assert grouped_rate_at(curves, 64, 9999) == pytest.approx(3e12)

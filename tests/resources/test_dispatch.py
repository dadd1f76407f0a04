"""What balanced choices lead to under deduplicated dispatch."""

import numpy as np
import pytest

from pipermoe.exchange.dispatch import savings
from pipermoe.exchange.topology import Topology
from pipermoe.resources.dispatch import balanced, balanced_hops, expected_hops, planned_choices

ROWS, TOP_K, EXPERTS, RANKS = 480, 4, 32, 8


@pytest.mark.parametrize("block", [2, 4])
def test_what_crosses_by_node_is_what_the_dispatch_plan_saves(block):
    hops = balanced_hops(ROWS, TOP_K, EXPERTS, RANKS, block, 0.0)
    counts_PE = balanced(ROWS, EXPERTS, RANKS).tolist()
    choices = [planned_choices(counts_E, ROWS // TOP_K, TOP_K) for counts_E in counts_PE]
    topology = Topology.even(RANKS // block, block)
    saved = savings(choices, np.arange(EXPERTS) * RANKS // EXPERTS, topology)
    assert hops.copies_out.sum() == hops.copies_in.sum() == saved.per_node
    assert hops.inside_out.sum() == hops.inside_in.sum()
    assert hops.rows_out.sum() == hops.rows_in.sum() == RANKS * ROWS * (block - 1) / block


@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_mean_is_that_of_independent_choices(block):
    mean = expected_hops(4000 * TOP_K, TOP_K, EXPERTS, RANKS, block, 0.0)
    generator = np.random.default_rng(0)
    choices = [np.argsort(generator.random((4000, EXPERTS)), axis=1)[:, :TOP_K] for _ in range(RANKS)]
    saved = savings(choices, np.arange(EXPERTS) * RANKS // EXPERTS, Topology.even(RANKS // block, block))
    assert mean.copies_out == mean.copies_in == pytest.approx(saved.per_node / RANKS, rel=0.01)
    assert mean.rows_out == pytest.approx(4000 * TOP_K * (block - 1) / block)


def test_a_capacity_keeps_what_experts_take_of_every_rank():
    whole = balanced_hops(ROWS, TOP_K, EXPERTS, RANKS, 2, 0.0)
    half = balanced_hops(ROWS, TOP_K, EXPERTS, RANKS, 2, 0.5)
    assert half.rows_out.sum() == RANKS * EXPERTS * 8 / 2  # ceil(0.5 * 480 / 32) = 8 rows of 15 are kept
    assert half.copies_out.sum() < whole.copies_out.sum()

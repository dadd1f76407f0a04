"""What balanced choices lead to under deduplicated dispatch."""

import numpy as np
import pytest

from pipermoe.exchange.dispatch import savings
from pipermoe.exchange.topology import Topology
from pipermoe.resources.dispatch import (
    balanced,
    chance_to_be_chosen,
    expected_hops,
    planned_choices,
    planned_hops,
    skewed,
)

ROWS, TOP_K, EXPERTS, RANKS = 480, 4, 32, 8


@pytest.mark.parametrize("block", [2, 4])
def test_what_crosses_by_node_is_what_the_dispatch_plan_saves(block):
    hops = planned_hops(ROWS, TOP_K, EXPERTS, RANKS, block, 0.0)
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


@pytest.mark.parametrize("weight", [1.0, 2.0, 4.0])
def test_a_popular_rank_is_chosen_by_as_many_tokens_as_draws_without_replacement_say(weight):
    tokens, held = 4000, EXPERTS // RANKS
    logits_E = np.log(np.repeat([weight, *[1.0] * (RANKS - 1)], held))
    choices_TK = np.argsort(-logits_E - np.random.default_rng(0).gumbel(size=(tokens, EXPERTS)), axis=1)[:, :TOP_K]
    share = np.count_nonzero(choices_TK < held) / choices_TK.size
    found = np.count_nonzero((choices_TK < held).any(axis=1)) / tokens
    assert chance_to_be_chosen(EXPERTS, TOP_K, share) == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_rows_inside_a_node_are_those_of_the_planned_choices(block):
    mean = expected_hops(16000, TOP_K, EXPERTS, RANKS, block, 0.0, 1.5)
    planned = planned_hops(16000, TOP_K, EXPERTS, RANKS, block, 0.0, 1.5, 3)
    assert mean.rows_in == planned.rows_in.ravel()[3]
    assert mean.rows_out == pytest.approx(planned.rows_out.ravel()[3], rel=1e-3)


def test_the_busiest_rank_gets_its_share_and_the_others_the_rest():
    counts_PE = skewed(ROWS, TOP_K, EXPERTS, RANKS, 1.5, 3)
    load_P = counts_PE.sum(0).reshape(RANKS, -1).sum(1)
    assert load_P[3] == 1.5 * ROWS
    assert np.ptp(np.delete(counts_PE[0].reshape(RANKS, -1), 3, axis=0)) <= 1
    assert (skewed(ROWS, TOP_K, EXPERTS, RANKS, 1.0, 3) == balanced(ROWS, EXPERTS, RANKS)).all()


def test_a_capacity_keeps_what_experts_take_of_every_rank():
    whole = planned_hops(ROWS, TOP_K, EXPERTS, RANKS, 2, 0.0)
    half = planned_hops(ROWS, TOP_K, EXPERTS, RANKS, 2, 0.5)
    assert half.rows_out.sum() == RANKS * EXPERTS * 8 / 2  # ceil(0.5 * 480 / 32) = 8 rows of 15 are kept
    assert half.copies_out.sum() < whole.copies_out.sum()

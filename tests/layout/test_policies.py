"""Policies: legal layouts, the same on every rank, none worse than what its rule promises."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from tests.layout.cases import problems

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.load import cross_node_share, drift, imbalance, least_imbalance, rank_load
from pipermoe.layout.packing import longest_first
from pipermoe.layout.policies import POLICIES
from pipermoe.layout.policies.eplb import Eplb
from pipermoe.layout.policies.expand_shrink import ExpandShrink
from pipermoe.layout.policies.heap import HeapReplicas
from pipermoe.layout.policies.incremental import Incremental
from pipermoe.layout.policies.sharding import HeterogeneousSharding
from pipermoe.layout.policies.sparse import SparseMaterialisation
from pipermoe.layout.policy import Nodes
from pipermoe.layout.replicas import greedy_copies, proportional_copies
from pipermoe.layout.transfer import Transfer
from pipermoe.layout.workloads import drifted, log_normal_shares

NEVER_WORSE = ("static", "hill-climbing", "swaps", "incremental", "expand-shrink")


def peak(layout: ExpertLayout, load) -> np.ndarray:
    return rank_load(layout, load).max(1)


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=25)
@given(problem=problems())
def test_a_plan_is_legal_repeatable_and_loses_no_row(name, problem):
    layout, load, nodes = problem
    planned = POLICIES[name].plan(layout, load, nodes)
    assert planned.shape == layout.shape
    assert (planned.copies_LE >= 1).all()
    assert planned.same_as(POLICIES[name].plan(layout, load.copy(), nodes))
    assert rank_load(planned, load).sum(1) == pytest.approx(load.sum(1))
    assert (imbalance(rank_load(planned, load)) >= least_imbalance(load, *layout.shape[1:]) - 1e-9).all()
    if name in NEVER_WORSE:
        assert (peak(planned, load) <= peak(layout, load) * (1 + 1e-9)).all()


def test_swaps_reach_what_all_exchanges_can_where_that_is_one_swap():
    layout, nodes = ExpertLayout.static(1, 2, 4), Nodes(2, 2)
    load = np.array([[9, 8, 2, 1]])
    assert peak(layout, load) == 17
    assert peak(POLICIES["hill-climbing"].plan(layout, load, nodes), load) == 10


def test_greedy_copies_leave_the_smallest_largest_copy():
    load = np.array([[7, 5, 3]])
    best = min(
        max(size / count for size, count in zip(load[0], counts, strict=True))
        for counts in product(range(1, 5), repeat=3)
        if sum(counts) == 6
    )
    copies = greedy_copies(load, 6)
    assert copies.sum() == 6
    assert (load / copies).max() == best


def test_proportional_copies_are_the_papers():
    # Goals 4.2, 1.2, 0.6 of 6 slots: floors 4, 1 and at least 1 fill them.
    assert proportional_copies(np.array([[7, 2, 1]]), 6).tolist() == [[4, 1, 1]]
    assert proportional_copies(np.array([[0, 0, 0]]), 6).tolist() == [[2, 2, 2]]


def test_groups_of_experts_stay_on_one_node():
    nodes, load = Nodes(4, 2), np.array([[9, 1, 1, 1, 5, 5, 1, 1]])
    layout = ExpertLayout.static(1, 4, 8, slots=3)
    planned = Eplb(groups=4).plan(layout, load, nodes)
    held = planned.copies_LNE[0].reshape(2, 2, 8).sum(1) > 0
    assert (held.reshape(2, 4, 2).any(2).sum(0) == 1).all()
    with pytest.raises(ValueError, match="groups = 3"):
        Eplb(groups=3).plan(layout, load, nodes)


def test_after_a_small_drift_a_repair_moves_a_handful_of_copies():
    nodes, shares = Nodes(16, 8), log_normal_shares(4, 64, 0.5, seed=1)
    load = np.rint(shares * 1e6).astype(np.int64)
    now = np.rint(drifted(shares, 0.08, seed=2) * 1e6).astype(np.int64)
    assert (drift(load, now) < 0.05).all()
    layout = POLICIES["balanced"].plan(ExpertLayout.static(4, 16, 64, slots=5), load, nodes)
    repaired, fresh = Incremental(target=1.03).plan(layout, now, nodes), POLICIES["balanced"].plan(layout, now, nodes)
    assert (imbalance(rank_load(repaired, now)) <= 1.03).all()
    moves = [len(Transfer.between(layout, new, nodes).moves) for new in (repaired, fresh)]
    assert moves[0] * 4 < moves[1]


def test_a_budget_is_kept():
    nodes, layout = Nodes(4, 4), ExpertLayout.static(1, 4, 16, slots=5)
    load = np.array([[30, 20, 20, 20] + [1] * 12])
    planned = Incremental(target=1.0, budget=2, rebuild_above=9.0).plan(layout, load, nodes)
    assert 0 < len(Transfer.between(layout, planned, nodes).moves) <= 2


def test_what_cannot_be_repaired_within_the_budget_is_planned_from_scratch():
    nodes, layout = Nodes(4, 4), ExpertLayout.static(1, 4, 16, slots=5)
    load = np.array([[30, 20, 20, 20] + [1] * 12])
    planned = Incremental(target=1.0, budget=2, rebuild_above=1.3).plan(layout, load, nodes)
    assert imbalance(rank_load(planned, load))[0] < 1.1


def test_expanding_takes_an_empty_slot_or_that_of_an_idle_copy():
    nodes, layout = Nodes(2, 2), ExpertLayout(np.array([[[0, 1], [2, 2]]]), 3)
    planned = ExpandShrink().plan(layout, np.array([[20, 2, 2]]), nodes)
    assert planned.slots_LNS[0].tolist() == [[0, 1], [2, 0]]
    assert ExpandShrink(threshold=3.0).plan(layout, np.array([[20, 2, 2]]), nodes).same_as(layout)


def test_where_transport_is_dear_equally_many_copies_near_every_source_win():
    nodes, layout = Nodes(4, 2), ExpertLayout.static(1, 4, 4, slots=2)
    load = np.array([[30, 2, 2, 2]])
    by_load, by_place = (HeapReplicas(transport).plan(layout, load, nodes) for transport in (0.0, 9.0))
    assert by_place.copies_LE.tolist() == [[2, 2, 2, 2]]
    assert cross_node_share(by_place, load, nodes) == 0 < cross_node_share(by_load, load, nodes)


def test_a_home_owns_as_many_experts_of_all_layers_as_any_other():
    nodes, load = Nodes(4, 2), np.array([[40, 10, 10, 10, 5, 5], [1, 2, 3, 4, 5, 6]])
    planned = HeterogeneousSharding().plan(ExpertLayout.static(2, 4, 6, slots=3), load, nodes)
    assert planned.copies_LNE.sum((0, 2)).tolist() == [3, 3, 3, 3]
    assert planned.copies_LNE[0, 0].tolist() == [1, 0, 0, 0, 0, 0]  # the hottest expert has its rank to itself


def test_copies_come_and_go_but_homes_stay():
    layout, nodes = ExpertLayout.static(1, 4, 8, slots=4), Nodes(4, 2)
    policy = SparseMaterialisation()
    first = policy.plan(layout, np.array([[1, 1, 1, 1, 1, 1, 1, 90]]), nodes)
    again = policy.plan(first, np.array([[90, 1, 1, 1, 1, 1, 1, 1]]), nodes)
    assert first.copies_LE.tolist() == [[1, 1, 1, 1, 1, 1, 1, 4]]
    assert again.copies_LE.tolist() == [[4, 1, 1, 1, 1, 1, 1, 1]]
    assert (again.home_LE == layout.home_LE).all()


def test_more_copies_than_slots_are_refused():
    with pytest.raises(ValueError, match="7 copies need more than 2 ranks of 3 slots"):
        longest_first(np.array([[0, 1, 2, 3, 4, 4, 4]]), np.ones((1, 5)), ranks=2, slots=3)

"""Integer programs: the optimum of small problems, and how far the quick policies are from it."""

import sys
from importlib.util import find_spec
from itertools import permutations, product

import numpy as np
import pytest

from pipermoe.layout.exact import Limits, assign_clusters, assign_experts
from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.load import rank_load
from pipermoe.layout.policies import POLICIES
from pipermoe.layout.policies.two_stage import TwoStage
from pipermoe.layout.policy import Nodes
from pipermoe.specs.errors import UserError

needs_scipy = pytest.mark.skipif(find_spec("scipy") is None, reason="scipy solves the programs")
EXACT = Limits(seconds=30, gap=0.0)
LOAD = np.array([13, 11, 7, 6, 5, 3, 2, 1])


def best(objective) -> float:
    placed = (np.array(ranks) for ranks in product(range(3), repeat=len(LOAD)))
    fitting = (ranks for ranks in placed if all(1 <= n <= 4 for n in np.bincount(ranks, minlength=3)))
    return min(objective(np.bincount(ranks, LOAD, minlength=3)) for ranks in fitting)


def test_without_scipy_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UserError, match=r"need scipy: pip install 'pipermoe\[exact\]'"):
        assign_experts(LOAD, 3, 4)


@needs_scipy
@pytest.mark.parametrize(
    ("objective", "value"), [("peak", np.max), ("deviation", lambda rows: np.abs(rows - rows.mean()).sum())]
)
def test_the_assignment_is_the_best_of_all(objective, value):
    found = assign_experts(LOAD, 3, 4, objective=objective, limits=EXACT)
    assert found.rank_E is not None
    assert value(np.bincount(found.rank_E, LOAD, minlength=3)) == pytest.approx(best(value))
    assert found.bound == pytest.approx(best(value))


@needs_scipy
def test_no_quick_policy_is_below_the_certificate_and_swaps_are_near_it():
    load, nodes = np.random.default_rng(5).integers(1, 90, 16), Nodes(4, 2)
    bound = assign_experts(load, 4, 4, limits=EXACT).bound
    swaps = POLICIES["swaps"].plan(ExpertLayout.static(1, 4, 16), load[None], nodes)
    assert bound <= rank_load(swaps, load[None]).max() <= 1.05 * bound


@needs_scipy
def test_clusters_go_where_the_heaviest_flow_is_least():
    flow, cost = (
        np.random.default_rng(2).random((4, 4)),
        np.array([[0, 1, 8, 8], [1, 0, 8, 8], [8, 8, 0, 1], [8, 8, 1, 0]]),
    )
    rank = assign_clusters(flow, cost, limits=EXACT)
    heaviest = min((flow[:, np.argsort(order)] * cost).max() for order in permutations(range(4)))
    assert sorted(rank) == [0, 1, 2, 3]
    assert (flow[:, np.argsort(rank)] * cost).max() == pytest.approx(heaviest)


@needs_scipy
def test_two_stages_are_as_even_as_the_first_and_follow_the_tokens_with_the_second():
    nodes, load = Nodes(2, 1), np.tile([4, 4, 4, 4], (2, 1))
    routes = np.array([[[0], [2]], [[1], [3]], [[2], [0]], [[3], [1]]])  # every token changes between halves
    planned = TwoStage(routes, limits=EXACT).plan(ExpertLayout.static(2, 2, 4), load, nodes)
    assert rank_load(planned, load).tolist() == [[8, 8], [8, 8]]
    rank = planned.home_LE
    crossing = sum(rank[0, first] != rank[1, second] for [first], [second] in routes)
    assert crossing in (0, 2)  # nothing crosses, or as much each way, as the clusters of the first program allow

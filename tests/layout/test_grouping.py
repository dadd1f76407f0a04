"""Grouping: experts that are chosen together share a node, and no node has more than its limit."""

import numpy as np
import pytest

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.grouping import co_selections, group_by_co_selection, group_by_load, node_loads
from pipermoe.layout.load import nodes_per_token
from pipermoe.layout.policies import POLICIES, policies_for
from pipermoe.layout.policy import Nodes
from pipermoe.layout.trace import read_trace


def test_co_selections_count_the_tokens_that_chose_both():
    routes = np.array([[[0, 1]], [[0, 1]], [[1, 2]]])
    assert co_selections(routes, 3)[0].tolist() == [[0, 2, 0], [2, 0, 1], [0, 1, 0]]


def test_experts_that_go_together_come_together():
    pairs = np.zeros((1, 4, 4))
    pairs[0, [0, 2, 1, 3], [2, 0, 3, 1]] = 5
    node = group_by_co_selection(pairs, np.ones((1, 4)), 2, slack=0.0)[0]
    assert node.tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])


def test_the_load_term_keeps_two_hot_experts_apart():
    pairs = np.zeros((1, 4, 4))
    pairs[0, [0, 1, 2, 3], [1, 0, 3, 2]] = 5
    load = np.array([[9, 9, 1, 1]])
    for slack, together in ((0.1, False), (1.0, True)):
        node = group_by_co_selection(pairs, load, 2, slack=slack)
        assert (node[0, 0] == node[0, 1]) == together
        assert node_loads(node, load, 2).max() <= (1 + slack) * 10


@pytest.mark.parametrize(("nodes", "slack"), [(2, 0.02), (4, 0.05)])
def test_random_groups_are_equal_in_number_and_under_the_limit(nodes, slack):
    random = np.random.default_rng(3)
    pairs = random.integers(0, 50, (2, 24, 24))
    pairs, load = pairs + pairs.transpose(0, 2, 1), random.integers(10, 40, (2, 24))
    node = group_by_co_selection(pairs * (1 - np.eye(24)), load, nodes, slack=slack)
    assert all(np.bincount(each, minlength=nodes).tolist() == [24 // nodes] * nodes for each in node)
    packed = node_loads(group_by_load(load, nodes), load, nodes).max(1)
    assert (node_loads(node, load, nodes).max(1) <= np.maximum(packed, (1 + slack) * load.sum(1) / nodes)).all()


def test_on_unseen_tokens_of_a_trace_fewer_nodes_are_visited():
    trace, nodes = read_trace("tiny-none"), Nodes(8, 2)
    layout, load = ExpertLayout.static(4, 8, 32, slots=5), trace.load_WLE[-5:].sum(0)
    assert trace.unseen_routes is not None
    visited = {
        name: nodes_per_token(policies_for(trace)[name].plan(layout, load, nodes), trace.unseen_routes, nodes).mean()
        for name in ("static", "node-first", "co-activation")
    }
    assert visited["co-activation"] < 0.92 * min(visited["static"], visited["node-first"])
    assert "co-activation" not in POLICIES

"""What a layout makes of a load."""

import numpy as np
import pytest

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.load import cross_node_share, nodes_per_token
from pipermoe.layout.policy import Nodes
from pipermoe.layout.workloads import imbalance_workloads

NODES = Nodes(4, 2)


def test_rows_leave_their_node_unless_a_copy_is_on_it():
    single = ExpertLayout(np.array([[[0], [1], [2], [3]]]), 4)
    assert cross_node_share(single, np.array([[7, 1, 1, 1]]), NODES).tolist() == [0.5]
    # Expert 0 has a copy on both nodes; of expert 1, with two copies on one, the other node's half crosses.
    copied = ExpertLayout(np.array([[[0, 1], [1, 3], [0, 2], [2, 3]]]), 4)
    assert cross_node_share(copied, np.array([[6, 4, 0, 0]]), NODES) == pytest.approx([0.2])


def test_a_token_visits_each_node_once():
    layout = ExpertLayout(np.array([[[0, 4], [1, 5], [2, 0], [3, 1]]]), 6)  # 0 and 1 are on both nodes
    routes = np.array([[[2, 3]], [[0, 1]], [[4, 2]], [[2, 0]]])
    assert nodes_per_token(layout, routes[:2], NODES).tolist() == [1.0]
    assert nodes_per_token(layout, routes[2:3], NODES).tolist() == [2.0]
    assert nodes_per_token(layout, routes[3:], NODES).tolist() == [1.0]


def test_the_workloads_are_what_their_names_say():
    found = imbalance_workloads(layers=2, experts=16, ranks=8, steps=10, rows=16_000)
    by_rank = {name.split()[0]: load.reshape(10, 2, 8, 2).sum(3) for name, load in found.items()}
    assert list(by_rank) == [f"W{n}" for n in range(8)]
    assert all(abs(load.sum(2) - 16_000).max() <= 16 for load in found.values())
    assert (by_rank["W0"] == 2000).all()
    assert (by_rank["W1"].argmax(2) == 2).all()
    assert (by_rank["W2"][..., 1] > 3 * by_rank["W2"][..., 0]).all()
    assert (by_rank["W5"][..., 1] == 0).all()
    assert by_rank["W6"][[0, 4, 5, 9]].argmax(2)[:, 0].tolist() == [1, 1, 5, 5]
    assert (by_rank["W7"].max(2)[:, 0] > 2000).tolist() == [step == 7 for step in range(10)]

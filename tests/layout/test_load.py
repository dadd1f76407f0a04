"""What a layout makes of a load."""

import numpy as np
import pytest

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.load import cross_node_share, nodes_per_token
from pipermoe.layout.policy import Nodes

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

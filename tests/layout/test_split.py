"""Token splits: every row computed once, near where it is, and no rank busier than it must be."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layout.cases import problems

from pipermoe.layout.expert_layout import EMPTY
from pipermoe.layout.policies import POLICIES
from pipermoe.layout.policy import Nodes
from pipermoe.layout.split import dispatch_rows, even_split, water_filling


@pytest.mark.parametrize("split", [even_split, water_filling])
@settings(deadline=None, max_examples=25)
@given(problem=problems(), seed=st.integers(0, 9))
def test_every_row_goes_from_its_source_to_a_copy_of_its_expert(split, problem, seed):
    layout, load_LE, nodes = problem
    slots_NS = POLICIES["heap"].plan(layout, load_LE, nodes).slots_LNS[0]
    counts_PE = np.random.default_rng(seed).multinomial(load_LE[0], [1 / nodes.ranks] * nodes.ranks).T
    rows_NS = split(slots_NS, load_LE[0])
    sent_PNS = dispatch_rows(slots_NS, counts_PE, rows_NS, nodes)
    assert (sent_PNS >= 0).all()
    assert (sent_PNS.sum(0) == rows_NS).all()
    assert (rows_NS[slots_NS == EMPTY] == 0).all()
    for expert, load in enumerate(load_LE[0]):
        assert rows_NS[slots_NS == expert].sum() == load
        assert (sent_PNS[:, slots_NS == expert].sum(1) == counts_PE[:, expert]).all()


@settings(deadline=None, max_examples=40)
@given(loads=st.lists(st.integers(0, 9), min_size=3, max_size=3), second=st.permutations(range(3)))
def test_water_filling_has_the_lowest_peak_of_all_splits(loads, second):
    slots_NS = np.stack([np.arange(3), np.array(second)], axis=1)
    cells = np.array([np.argwhere(slots_NS == expert) for expert in range(3)])[:, :, 0]  # the two ranks of each expert
    best = min(
        max(
            np.bincount(cells.ravel(), np.ravel([[part, load - part] for part, load in zip(parts, loads, strict=True)]))
        )
        for parts in product(*(range(load + 1) for load in loads))
    )
    rows_NS = water_filling(slots_NS, np.array(loads))
    assert best <= rows_NS.sum(1).max() <= best + 1


def test_rows_stay_on_their_rank_then_on_their_node():
    slots_NS = np.array([[0], [1], [0], [1]])
    counts_PE = np.array([[3, 0], [1, 0], [5, 0], [0, 8]])
    sent_PNS = dispatch_rows(slots_NS, counts_PE, even_split(slots_NS, counts_PE.sum(0)), Nodes(4, 2))
    assert sent_PNS[:, 0, 0].tolist() == [3, 1, 1, 0]  # 5 rows for rank 0: its own, its node's, one from the other node
    assert sent_PNS[:, 2, 0].tolist() == [0, 0, 4, 0]
    assert sent_PNS[3].sum(1).tolist() == [0, 4, 0, 4]

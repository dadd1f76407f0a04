"""What the runtime takes of a layout: a rank computes an expert once, and one rank has its optimizer state."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipermoe.layout.expert_layout import EMPTY, ExpertLayout
from pipermoe.layout.homes import homes_alone, one_copy_a_rank


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 99), ranks=st.integers(1, 4), experts=st.integers(1, 6))
def test_no_rank_has_an_expert_twice_and_none_loses_one(seed: int, ranks: int, experts: int):
    slots_LNS = np.random.default_rng(seed).integers(EMPTY, experts, (2, ranks, 5))
    slots_LNS[:, 0, -1] = experts - 1
    layout = ExpertLayout(np.concatenate([slots_LNS, np.tile(np.arange(experts), (2, ranks, 1))], axis=2), experts)
    once = ExpertLayout(one_copy_a_rank(layout), experts)
    assert (once.copies_LNE == np.minimum(layout.copies_LNE, 1)).all()


def test_a_home_stays_while_its_rank_has_a_copy_and_then_moves_to_the_lowest_that_has():
    first = ExpertLayout(np.array([[[0, EMPTY], [1, 0], [1, EMPTY]]]), 2)
    assert homes_alone(first).slots_LNS.tolist() == [[[0, EMPTY], [1, EMPTY], [EMPTY, EMPTY]]]
    second = first.successor(np.array([[[EMPTY, EMPTY], [0, EMPTY], [1, 0]]]))
    assert homes_alone(second).slots_LNS.tolist() == [[[EMPTY, EMPTY], [EMPTY, 0], [1, EMPTY]]]

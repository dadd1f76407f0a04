"""The layout: every expert somewhere, whatever divides what, and nothing moves that may stay."""

import numpy as np
import pytest
from hypothesis import given, settings
from tests.layout.cases import problems

from pipermoe.layout.expert_layout import EMPTY, ExpertLayout


def test_static_puts_experts_in_order_as_evenly_as_can_be():
    layout = ExpertLayout.static(layers=1, ranks=3, experts=7, slots=4)
    assert layout.slots_LNS[0].tolist() == [[0, 1, 2, EMPTY], [3, 4, EMPTY, EMPTY], [5, 6, EMPTY, EMPTY]]
    assert layout.copies_LE.tolist() == [[1] * 7]


def test_too_few_slots_are_refused_with_the_number_that_would_do():
    with pytest.raises(ValueError, match="2 slots have no room for 7 experts; slots = 3 do"):
        ExpertLayout.static(1, 3, 7, slots=2)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([[[0, 1], [2, 2]]], "expert 3 of layer 0 has no slot"),
        ([[[0, 1], [2, 4]]], "a slot holds an expert from 0 to 3"),
        ([[0, 1], [2, 3]], "shape"),
    ],
)
def test_what_is_no_layout_is_refused(slots, message):
    with pytest.raises(ValueError, match=message):
        ExpertLayout(np.array(slots), num_experts=4)


def test_an_expert_that_stays_on_its_rank_keeps_its_slot():
    before = ExpertLayout(np.array([[[0, 1, 2], [3, 4, 5]]]), 6)
    after = before.successor(np.array([[[2, 5, 0], [1, 4, 3]]]))
    assert after.slots_LNS[0].tolist() == [[0, 5, 2], [3, 4, 1]]
    assert after.version == before.version + 1


@settings(deadline=None, max_examples=30)
@given(problems())
def test_settling_changes_no_ranks_copies(problem):
    layout, _, _ = problem
    shuffled = np.random.default_rng(0).permuted(layout.slots_LNS.reshape(len(layout.slots_LNS), -1), axis=1)
    after = shuffled.reshape(layout.slots_LNS.shape)
    assert layout.successor(after).same_as(ExpertLayout(after.copy(), layout.num_experts))

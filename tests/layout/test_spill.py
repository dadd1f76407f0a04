"""Spill: the overflow goes elsewhere, as far as the slack asks for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layout.cases import problems

from pipermoe.layout.expert_layout import EMPTY
from pipermoe.layout.spill import Ephemeral, SpillRule, guest_moves, load_after, spill, with_guests
from pipermoe.layout.split import even_split


@settings(deadline=None, max_examples=40)
@given(problem=problems(), slack=st.sampled_from([1.0, 1.1, 1.5]))
def test_no_rank_is_above_the_slack_and_every_copy_has_rows_of_its_source(problem, slack):
    layout, load_LE, _ = problem
    slots_NS = layout.slots_LNS[0]
    rows_NS = even_split(slots_NS, load_LE[0])
    copies = spill(slots_NS, rows_NS, SpillRule(slack))
    assert load_after(rows_NS, copies).max() <= np.ceil(slack * load_LE.sum(1)[0] / len(slots_NS))
    assert all(copy.expert in slots_NS[copy.source] and copy.rows > 0 for copy in copies)
    assert len({(copy.expert, copy.destination) for copy in copies}) == len(copies)


def test_exact_balance_takes_a_copy_per_idle_rank_and_slack_fewer():
    slots_NS, rows_NS = np.array([[0], [1], [2], [3]]), np.array([[10], [2], [2], [2]])
    assert spill(slots_NS, rows_NS, SpillRule()) == (
        Ephemeral(0, 0, 1, 2),
        Ephemeral(0, 0, 2, 2),
        Ephemeral(0, 0, 3, 2),
    )
    assert len(spill(slots_NS, rows_NS, SpillRule(2.0))) == 1
    assert spill(slots_NS, rows_NS, SpillRule(3.0)) == ()


def test_a_few_rows_are_not_worth_a_copy():
    slots_NS, rows_NS = np.array([[0], [1]]), np.array([[12], [8]])
    assert spill(slots_NS, rows_NS, SpillRule(least_rows=3)) == ()
    assert spill(slots_NS, rows_NS, SpillRule(least_rows=2)) == (Ephemeral(0, 0, 1, 2),)


def test_a_rank_takes_no_more_copies_than_the_rule_allows():
    slots_NS, rows_NS = np.array([[0, 1, 2], [3, 4, 5]]), np.array([[10, 10, 10], [0, 0, 0]])
    assert len(spill(slots_NS, rows_NS, SpillRule())) == 2
    assert spill(slots_NS, rows_NS, SpillRule(most_copies=1)) == (Ephemeral(0, 0, 1, 10),)


@settings(deadline=None, max_examples=40)
@given(problem=problems(), most=st.integers(1, 3))
def test_guests_have_slots_of_their_own_and_no_row_is_lost(problem, most):
    layout, load_LE, _ = problem
    slots_NS = layout.slots_LNS[0]
    rows_NS = even_split(slots_NS, load_LE[0])
    copies = spill(slots_NS, rows_NS, SpillRule(most_copies=most))
    slots_NX, rows_NX = with_guests(slots_NS, rows_NS, copies)
    own = slots_NS.shape[1]
    assert np.array_equal(slots_NX[:, :own], slots_NS)
    assert slots_NX.shape[1] - own <= most
    assert rows_NX.min() >= 0
    assert np.array_equal(rows_NX.sum(1), load_after(rows_NS, copies))
    filled = slots_NX != EMPTY
    by_expert_E = np.bincount(slots_NX[filled], rows_NX[filled], minlength=layout.num_experts)
    assert np.array_equal(by_expert_E, load_LE[0])
    moves = guest_moves(0, slots_NX, own, copies)
    assert sorted((move.destination, move.expert) for move in moves) == sorted(
        (rank, expert)
        for rank, experts in enumerate(slots_NX[:, own:].tolist())
        for expert in experts
        if expert != EMPTY
    )
    assert all(move.expert in slots_NS[move.source] for move in moves)


@pytest.mark.parametrize(
    ("values", "rule"), [({"slack": 0.9}, r"slack = 0\.9: must be at least 1"), ({"least_rows": 0}, "least_rows = 0")]
)
def test_a_rule_that_means_nothing_is_refused(values, rule):
    with pytest.raises(ValueError, match=rule):
        SpillRule(**values)

"""Spill: the overflow goes elsewhere, as far as the slack asks for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.layout.cases import problems

from pipermoe.layout.spill import Ephemeral, load_after, spill
from pipermoe.layout.split import even_split


@settings(deadline=None, max_examples=40)
@given(problem=problems(), slack=st.sampled_from([1.0, 1.1, 1.5]))
def test_no_rank_is_above_the_slack_and_every_copy_has_rows_of_its_source(problem, slack):
    layout, load_LE, _ = problem
    slots_NS = layout.slots_LNS[0]
    rows_NS = even_split(slots_NS, load_LE[0])
    copies = spill(slots_NS, rows_NS, slack=slack)
    assert load_after(rows_NS, copies).max() <= np.ceil(slack * load_LE.sum(1)[0] / len(slots_NS))
    assert all(copy.expert in slots_NS[copy.source] and copy.rows > 0 for copy in copies)
    assert len({(copy.expert, copy.destination) for copy in copies}) == len(copies)


def test_exact_balance_takes_a_copy_per_idle_rank_and_slack_fewer():
    slots_NS, rows_NS = np.array([[0], [1], [2], [3]]), np.array([[10], [2], [2], [2]])
    assert spill(slots_NS, rows_NS) == (Ephemeral(0, 0, 1, 2), Ephemeral(0, 0, 2, 2), Ephemeral(0, 0, 3, 2))
    assert len(spill(slots_NS, rows_NS, slack=2.0)) == 1
    assert spill(slots_NS, rows_NS, slack=3.0) == ()


def test_a_few_rows_are_not_worth_a_copy():
    slots_NS, rows_NS = np.array([[0], [1]]), np.array([[12], [8]])
    assert spill(slots_NS, rows_NS, least_rows=3) == ()
    assert spill(slots_NS, rows_NS, least_rows=2) == (Ephemeral(0, 0, 1, 2),)


def test_less_than_perfect_balance_is_refused():
    with pytest.raises(ValueError, match=r"slack = 0\.9: must be at least 1"):
        spill(np.array([[0], [1]]), np.array([[1], [1]]), slack=0.9)

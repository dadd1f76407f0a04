"""Policies on a trace: what follows a plan is what it is judged by."""

import numpy as np
import pytest

from pipermoe.layout.policies import POLICIES
from pipermoe.layout.replay import compare_policies, stretches
from pipermoe.layout.trace import Trace

SKEWED = np.array([[9, 8, 2, 1]])


def compare(loads, *names, slots=2, every=2, window=1):
    trace = Trace("made", np.stack(loads))
    chosen = {name: POLICIES[name] for name in names}
    return compare_policies(trace, chosen, ranks=2, nodes=1, slots=slots, every=every, window=window)


def test_the_steps_are_cut_into_what_is_known_and_what_follows():
    loads = np.arange(5).reshape(5, 1, 1)
    cut = [(forecast.ravel().tolist(), following.ravel().tolist()) for forecast, following in stretches(loads, 2, 2)]
    assert cut == [([0], [2, 3]), ([2], [4])]  # means of 0 and 1, of 2 and 3, halves rounded to even


def test_a_load_that_stands_still_is_met_as_planned():
    found = compare([SKEWED] * 4, "static", "hill-climbing")
    static, climbing = found.policies
    assert (static.met, static.moves, static.first_moves) == (1.7, 0, 0)
    assert (climbing.planned, climbing.met, climbing.worst_layer) == (1.0, 1.0, 1.0)
    assert (climbing.first_moves, climbing.moves) == (2, 0)
    assert climbing.imbalance == (1.0, 1.0, 1.0)


def test_a_load_that_turns_is_planned_for_too_late():
    (swaps,) = compare([np.array([[9, 9, 1, 1]]), np.array([[9, 1, 1, 9]])], "swaps", every=5).policies
    assert (swaps.planned, swaps.met) == (1.0, 1.8)


def test_no_policy_is_below_the_bound():
    found = compare([np.array([[30, 1, 1, 1]])], *POLICIES, slots=3)
    assert found.bound == pytest.approx(1.0)
    assert all(each.met >= found.bound - 1e-9 for each in found.policies)

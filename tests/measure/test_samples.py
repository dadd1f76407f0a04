"""Robust statistics: what is dropped, what stays, and what ranks say together."""

import numpy as np
import pytest

from pipermoe.measure.samples import Point, merge_ranks, summarize


def test_a_preempted_sample_is_dropped_and_counted():
    result = summarize([1.00, 1.01, 0.99, 1.00, 1.02, 9.0])
    assert (result.kept, result.dropped) == (5, 1)
    assert result.seconds == 1.00


def test_a_third_of_wild_samples_does_not_move_the_median():
    random = np.random.default_rng(0)
    quiet = 2e-3 * (1 + 0.02 * random.standard_normal(40))
    result = summarize([*quiet, *(2e-3 * random.uniform(3, 30, 20))])
    assert result.dropped == 20
    assert result.seconds == pytest.approx(float(np.median(quiet)), rel=1e-2)


def test_identical_timings_are_kept_whole():
    result = summarize([0.5] * 7)
    assert (result.seconds, result.spread, result.kept, result.dropped) == (0.5, 0.0, 7, 0)


def test_the_spread_is_the_interquartile_range_over_the_median():
    assert summarize([0.98, 0.99, 1.0, 1.01, 1.02]).spread == pytest.approx(0.02)


def test_ranks_merge_to_their_median_and_add_up_their_samples():
    ranks = [[Point(8, 80, seconds, spread, 10, 1)] for seconds, spread in ((1.0, 0.1), (2.0, 0.3), (9.0, 0.2))]
    assert merge_ranks(ranks) == [Point(8, 80, 2.0, 0.3, 30, 3)]


def test_a_size_that_one_rank_left_out_is_left_out():
    full = [Point(1, 1, 1.0), Point(2, 2, 2.0)]
    assert [point.size for point in merge_ranks([full, full[:1]])] == [1]

"""Fits recover what synthetic measurements were made from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipermoe.measure.fits import fit_link_cost, fit_rate_curve
from pipermoe.measure.samples import Point

SIZES = [2.0**n for n in (10, 13, 16, 18, 20, 22, 24)]


def seconds_of(latency: float, bandwidth: float, sizes=SIZES) -> list[float]:
    return [latency + size / bandwidth for size in sizes]


@given(st.floats(1e-6, 1e-2), st.floats(1e8, 1e12))
@settings(deadline=None, max_examples=50)
def test_exact_data_gives_back_latency_and_bandwidth(latency, bandwidth):
    cost, residual = fit_link_cost(SIZES, seconds_of(latency, bandwidth))
    assert residual == 0.0
    predicted = [cost.latency_seconds + size / cost.bandwidth_bytes_per_s for size in SIZES]
    np.testing.assert_allclose(predicted, seconds_of(latency, bandwidth), rtol=1e-4)


def test_noise_of_five_percent_moves_both_by_less_than_ten():
    random = np.random.default_rng(1)
    noisy = [t * (1 + 0.05 * random.standard_normal()) for t in seconds_of(1e-4, 1e9)]
    cost, residual = fit_link_cost(SIZES, noisy)
    assert cost.latency_seconds == pytest.approx(1e-4, rel=0.1)
    assert cost.bandwidth_bytes_per_s == pytest.approx(1e9, rel=0.1)
    assert 0.005 < residual < 0.1


def test_one_spoilt_size_does_not_bend_the_line_but_shows_in_the_residual():
    spoilt = seconds_of(1e-4, 1e9)
    spoilt[3] *= 6
    cost, residual = fit_link_cost(SIZES, spoilt)
    assert cost.latency_seconds == pytest.approx(1e-4, rel=0.03)
    assert cost.bandwidth_bytes_per_s == pytest.approx(1e9, rel=0.03)
    assert residual > 0.2


def test_latency_is_never_negative():
    cost, _ = fit_link_cost([1.0, 2.0, 4.0], [0.9, 2.0, 4.4])
    assert cost.latency_seconds == 0.0
    assert cost.bandwidth_bytes_per_s == pytest.approx(1.0, rel=0.2)


def test_when_size_does_not_matter_bandwidth_is_beyond_what_could_be_seen():
    cost, _ = fit_link_cost([1e3, 1e4, 1e5], [3e-3, 2e-3, 1e-3])
    assert 1e-3 <= cost.latency_seconds <= 3e-3
    assert 1e5 / cost.bandwidth_bytes_per_s < 0.02 * cost.latency_seconds


def test_a_curve_keeps_its_points_in_ascending_order():
    curve = fit_rate_curve([Point(64, 640, 2.0), Point(4, 40, 1.0)])
    assert (curve.size, curve.rate) == ((4.0, 64.0), (40.0, 320.0))


def test_points_of_nearly_the_same_size_become_their_work_over_their_time():
    curve = fit_rate_curve([Point(1000, 10, 1.0), Point(1020, 30, 1.0), Point(4096, 5, 1.0)])
    assert curve.rate == (20.0, 5.0)
    assert curve.size[0] == pytest.approx((1000 * 1020) ** 0.5, rel=1e-5)

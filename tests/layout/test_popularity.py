"""Popularity: the distribution that fits loads."""

import numpy as np
import pytest

from pipermoe.layout.popularity import fit_popularity
from pipermoe.layout.trace import read_trace, shipped_traces
from pipermoe.layout.workloads import log_normal_shares


def test_a_log_normal_load_has_its_sigma_back_and_zipf_fits_worse():
    fit = fit_popularity(np.rint(1e6 * log_normal_shares(8, 256, 0.5, seed=0)))
    assert fit.sigma == pytest.approx(0.5, rel=0.05)
    assert fit.r2_log_normal > 0.98 > fit.r2_zipf


def test_an_even_load_has_no_spread():
    assert fit_popularity(np.full((2, 8), 5)).sigma == 0.0


def test_without_balancing_the_router_of_the_shipped_model_spreads_most():
    sigma = {name: fit_popularity(read_trace(name).load_WLE[-20:].sum(0)).sigma for name in shipped_traces()}
    assert sigma["tiny-bias"] < sigma["tiny-none"] > sigma["tiny-aux"]

"""Popularity: the distribution that fits loads, and what it says of ranks and capacities."""

import numpy as np
import pytest

from pipermoe.layout.popularity import fit_popularity, kept_share, static_imbalance
from pipermoe.layout.trace import read_trace, shipped_traces
from pipermoe.layout.workloads import log_normal_shares


def test_a_log_normal_load_has_its_sigma_back_and_zipf_fits_worse():
    fit = fit_popularity(np.rint(1e6 * log_normal_shares(8, 256, 0.5, seed=0)))
    assert fit.sigma == pytest.approx(0.5, rel=0.05)
    assert fit.r2_log_normal > 0.98 > fit.r2_zipf


def test_an_even_load_has_no_spread():
    assert fit_popularity(np.full((2, 8), 5)).sigma == 0.0
    assert static_imbalance(0.0, experts=8, ranks=4) == 1.0


def test_without_balancing_the_router_of_the_shipped_model_spreads_most():
    sigma = {name: fit_popularity(read_trace(name).load_WLE[-20:].sum(0)).sigma for name in shipped_traces()}
    assert sigma["tiny-bias"] < sigma["tiny-none"] > sigma["tiny-aux"]


def test_more_experts_on_a_rank_even_out_and_worse_layers_are_worse():
    typical = static_imbalance(0.5, experts=64, ranks=8)
    assert static_imbalance(0.5, experts=256, ranks=8) < typical < static_imbalance(0.5, 64, 8, quantile=0.95)
    one_each = np.exp(0.5 * np.random.default_rng(0).standard_normal((2000, 8)))
    assert static_imbalance(0.5, 8, 8) == np.median(one_each.max(1) / one_each.mean(1))


@pytest.mark.parametrize(("sigma", "capacity"), [(0.3, 1.0), (0.8, 1.25), (1.2, 2.0)])
def test_kept_rows_are_those_under_the_capacity(sigma, capacity):
    drawn = np.exp(sigma * np.random.default_rng(1).standard_normal(400_000) - sigma**2 / 2)
    assert kept_share(sigma, capacity) == pytest.approx(np.minimum(drawn, capacity).mean(), abs=3e-3)
    assert kept_share(0.0, capacity) == 1.0

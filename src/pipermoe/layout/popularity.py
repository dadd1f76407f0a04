"""The popularity of experts as a distribution: log-normal, fitted to a load; what it makes of ranks and of capacities.

Log-normal fits the loads of trained routers better than a power law (docs/balance.md shows both). Its one number,
sigma, is what `plan --imbalance` needs before there is a run to measure.
"""

# L MoE layers, E logical experts, N ranks, D draws

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

DRAWS, SEED = 2000, 0


@dataclass(frozen=True, slots=True)
class Fit:
    """Popularity is in proportion to exp(sigma z), z normal; the share of the variance of log load that either
    distribution explains (R squared), means over layers.
    """

    sigma: float
    r2_log_normal: float
    r2_zipf: float


def fit_popularity(load_LE: NDArray) -> Fit:
    """Straight lines through the sorted logarithms of the loads: over normal quantiles, and over log ranks (Zipf).

    Experts without rows are left out.
    """
    sigmas, normal, zipf = [], [], []
    for load_E in load_LE:
        logs = np.log(np.sort(load_E[load_E > 0])[::-1])
        if len(logs) < 3 or logs[0] == logs[-1]:
            continue  # an even load has no shape
        places = np.arange(1, len(logs) + 1)
        quantiles = np.array([-NormalDist().inv_cdf((place - 0.5) / len(logs)) for place in places])
        sigmas.append(float(np.polyfit(quantiles, logs, 1)[0]))
        normal.append(np.corrcoef(quantiles, logs)[0, 1] ** 2)
        zipf.append(np.corrcoef(np.log(places), logs)[0, 1] ** 2)
    if not sigmas:
        return Fit(0.0, 1.0, 1.0)
    return Fit(float(np.mean(sigmas)), float(np.mean(normal)), float(np.mean(zipf)))


def static_imbalance(sigma: float, experts: int, ranks: int, quantile: float = 0.5) -> float:
    """Rows of the busiest rank over the mean in a layer whose experts lie in order on the ranks: a quantile over draws
    of the popularity (0.5: the usual layer, 0.95: one layer in twenty is worse). The same draws for every call.
    """
    share_DE = np.exp(sigma * np.random.default_rng(SEED).standard_normal((DRAWS, experts)))
    first_N = np.concatenate([[0], np.cumsum([len(part) for part in np.array_split(np.arange(experts), ranks)])[:-1]])
    load_DN = np.add.reduceat(share_DE, first_N, axis=1)
    return float(np.quantile(load_DN.max(1) / load_DN.mean(1), quantile))


def kept_share(sigma: float, capacity_factor: float) -> float:
    """Share of the rows that capacities of `capacity_factor` times the even share leave: E[min(W, c)], W of mean 1."""
    if sigma == 0:
        return min(1.0, capacity_factor)
    normal, edge = NormalDist(), math.log(capacity_factor) / sigma
    return normal.cdf(edge - sigma / 2) + capacity_factor * (1 - normal.cdf(edge + sigma / 2))

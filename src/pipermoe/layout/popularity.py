"""The popularity of experts as a distribution: log-normal, fitted to a load.

Log-normal fits the loads of trained routers better than a power law (docs/balance.md shows both). Its one number,
sigma, is what `dryrun --routing lognormal:sigma=S` draws a load from before there is a run to measure.
"""

# L MoE layers, E logical experts

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray


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

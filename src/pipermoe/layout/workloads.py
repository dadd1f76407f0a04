"""Loads to plan for: random ones with the shape of real traces, and the imbalance workloads of the field.

Expert popularity of trained models is log-normal rather than a power law (R^2 0.84 to 0.98 on public traces); its sigma
is about 0.15 to 0.35 where the router is balanced by a loss or a bias, 0.3 to 0.6 on a pre-training mix and above 1
without any balancing.
"""

# L MoE layers, E logical experts, P source ranks

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.load import LoadStatistics


def log_normal_shares(layers: int, experts: int, sigma: float, seed: int) -> NDArray[np.float64]:
    """Random popularity of the experts of each layer, (L, E); rows sum to 1."""
    drawn = np.exp(sigma * np.random.default_rng(seed).standard_normal((layers, experts)))
    return drawn / drawn.sum(1, keepdims=True)


def drifted(shares_LE: NDArray[np.float64], sigma: float, seed: int) -> NDArray[np.float64]:
    """The popularity after a log-normal step of each expert."""
    moved = shares_LE * np.exp(sigma * np.random.default_rng(seed).standard_normal(shares_LE.shape))
    return moved / moved.sum(1, keepdims=True)


def draw(shares_LE: NDArray[np.float64], sources: int, rows: int, seed: int) -> LoadStatistics:
    """`rows` rows of every source in every layer, drawn independently from the shares."""
    random = np.random.default_rng(seed)
    return LoadStatistics(np.stack([random.multinomial(rows, shares_LE) for _ in range(sources)]))

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


def mixed_shares(layers: int, experts: int, seed: int) -> NDArray[np.float64]:
    """Popularity as of a pre-training mix, (L, E): per layer Zipf of exponent 0.2 to 0.6 times log-normal of 0.3."""
    random = np.random.default_rng(seed)
    rank_LE = random.permuted(np.tile(np.arange(1.0, experts + 1), (layers, 1)), axis=1)
    drawn = rank_LE ** -random.uniform(0.2, 0.6, (layers, 1)) * np.exp(0.3 * random.standard_normal(rank_LE.shape))
    return drawn / drawn.sum(1, keepdims=True)


def imbalance_workloads(layers: int, experts: int, ranks: int, steps: int, rows: int) -> dict[str, NDArray[np.int64]]:
    """The token-imbalance workloads W0 to W7, each (steps, L, E) with about `rows` rows in a layer; no noise.

    `experts` must be a multiple of `ranks`: hot and idle ranks are those of the static layout. The names are those that
    users of Megatron-LM ask a public benchmark for; the sizes are ours.
    """
    held = experts // ranks
    even, every = np.ones(experts), np.ones((steps, layers, 1))
    hot_expert, hot_rank, idle_rank = even.copy(), even.copy(), even.copy()
    hot_expert[experts // 3] = 8.0
    hot_rank[held : 2 * held] = 6.0
    idle_rank[held : 2 * held] = 0.0
    # Source p has p + 1 parts of the rows and its own favourites: what is even over sources is not even in sum.
    favourites = np.stack([1 + 3.0 * (np.arange(experts) % ranks == source) for source in range(ranks)])
    ragged = np.arange(1, ranks + 1) @ (favourites / favourites.sum(1, keepdims=True))
    turning = np.stack([np.roll(hot_rank, held * 4 * (step // 5)) for step in range(steps)])
    bursts = np.stack([hot_expert**2 if step % 8 == 7 else even for step in range(steps)])
    weights = {
        "W0 even": every * even,
        "W1 hot expert": every * hot_expert,
        "W2 hot rank": every * hot_rank,
        "W3 spread": every * log_normal_shares(layers, experts, 0.6, seed=3),
        "W4 ragged sources": every * ragged,
        "W5 idle rank": every * idle_rank,
        "W6 rotating": every * turning[:, None],
        "W7 burst": every * bursts[:, None],
    }
    return {
        name: np.rint(rows * weight / weight.sum(2, keepdims=True)).astype(np.int64) for name, weight in weights.items()
    }

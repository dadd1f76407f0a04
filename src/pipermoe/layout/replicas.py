"""How many copies of each expert: the slots divided over experts by their load."""

# L MoE layers, E logical experts

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def greedy_copies(load_LE: NDArray, total: int, most: int | None = None) -> NDArray[np.int64]:
    """Copies (L, E) with `total` in each layer, every next one for the expert whose copies are the largest.

    Optimal for the size of the largest copy. No expert gets more than `most`; slots may stay empty for that.
    """
    layers, experts = load_LE.shape
    copies = np.ones((layers, experts), dtype=np.int64)
    rows = np.arange(layers)
    for _ in range(total - experts):
        size = load_LE / copies
        if most is not None:
            size = np.where(copies < most, size, -1.0)
        expert = size.argmax(1)
        copies[rows, expert] += size[rows, expert] >= 0
    return copies


def proportional_copies(load_LE: NDArray, total: int) -> NDArray[np.int64]:
    """Copies (L, E) in proportion to the load, at least one, `total` in each layer (SwiftMoE, algorithm 1)."""
    layers = len(load_LE)
    weight = np.where(load_LE.sum(1, keepdims=True) > 0, load_LE, 1)
    goal = weight / weight.sum(1, keepdims=True) * total
    copies = np.maximum(np.floor(goal).astype(np.int64), 1)
    for layer in range(layers):
        while (excess := copies[layer].sum() - total) != 0:
            above = copies[layer] - goal[layer]
            if excess > 0:
                copies[layer, np.where(copies[layer] > 1, above, -np.inf).argmax()] -= 1
            else:
                copies[layer, above.argmin()] += 1
    return copies

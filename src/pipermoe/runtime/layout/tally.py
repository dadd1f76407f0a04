"""How evenly the ranks of an expert-parallel group computed, counted where rows are dispatched."""

# L MoE layers of the model, N ranks of the expert-parallel group

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray


class Tally:
    """Of one step, over its micro-batches, in the layers of this rank: rows of the busiest rank and mean rows (L,), and
    how many copies were made for one micro-batch alone.
    """

    def __init__(self, layers: int) -> None:
        self.busiest_L, self.mean_L = np.zeros(layers), np.zeros(layers)
        self.spilled = 0
        self._counts = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count from zero in this block, and nothing outside of it."""
        self.busiest_L[:], self.mean_L[:], self.spilled = 0, 0, 0
        self._counts = True
        try:
            yield
        finally:
            self._counts = False

    def add(self, layer: int, rows_N: NDArray[np.int64], spilled: int) -> None:
        if self._counts:
            self.busiest_L[layer] += rows_N.max()
            self.mean_L[layer] += rows_N.mean()
            self.spilled += spilled

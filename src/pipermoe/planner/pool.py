"""What a search may still take up, in the order of its bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FEW = 128


class Pool:
    """Items (numbers) with their bounds, the lowest first; of equal bounds the lowest item."""

    def __init__(self, items: NDArray[np.int64], bounds: NDArray[np.float64]) -> None:
        self.items, self.bounds = items, bounds
        self._more = FEW

    @classmethod
    def of(cls, items: NDArray | None = None, bounds: NDArray | None = None) -> Pool:
        pool = cls(np.zeros(0, dtype=np.int64), np.zeros(0))
        if items is not None and bounds is not None:
            pool.add(items, bounds)
        return pool

    def __len__(self) -> int:
        return len(self.items)

    @property
    def least(self) -> float:
        """The lowest bound; infinite if the pool is empty."""
        return float(self.bounds[0]) if len(self.bounds) else np.inf

    def add(self, items: NDArray, bounds: NDArray) -> None:
        items, bounds = np.concatenate([self.items, items]), np.concatenate([self.bounds, bounds])
        order = np.lexsort((items, bounds))
        self.items, self.bounds = items[order], bounds[order]

    def take(self, most: int, limit: float) -> NDArray[np.int64]:
        """The first items, up to `most`, whose bounds do not exceed `limit`: they leave the pool."""
        count = min(most, int(np.searchsorted(self.bounds, limit, side="right")))
        taken, self.items, self.bounds = self.items[:count], self.items[count:], self.bounds[count:]
        return taken

    def take_more(self, limit: float) -> NDArray[np.int64]:
        """As `take`, few at first and twice as many each time."""
        self._more *= 2
        return self.take(self._more // 2, limit)

    def remove(self, mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The items of `mask` and their bounds: they leave the pool."""
        taken = self.items[mask], self.bounds[mask]
        self.items, self.bounds = self.items[~mask], self.bounds[~mask]
        return taken

"""Figures that are worked out once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]  # of heads, branches or places, all different
Figures = NDArray[np.float64]


class Known:
    """What `ask` says of numbers; those that have been asked for before are remembered."""

    def __init__(self, ask: Callable[[Numbers], Figures]) -> None:
        self._ask = ask
        self._numbers, self._figures = np.zeros(0, dtype=np.int64), np.zeros(0)  # numbers ascend

    def __call__(self, numbers: Numbers) -> Figures:
        new = np.sort(numbers[np.isnan(self.so_far(numbers))])
        if len(new):
            together = np.concatenate([self._numbers, new])
            order = np.argsort(together, kind="stable")
            self._numbers, self._figures = together[order], np.concatenate([self._figures, self._ask(new)])[order]
        return self.so_far(numbers)

    def so_far(self, numbers: Numbers) -> Figures:
        """The figures of `numbers`; of those not asked for yet nan."""
        place = np.searchsorted(self._numbers, numbers)
        return np.where(np.append(self._numbers, -1)[place] == numbers, np.append(self._figures, np.nan)[place], np.nan)

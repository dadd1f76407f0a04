"""Prices of what happens inside a stage: known ones kept, and those of a row done in several ways."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.groups import INSIDE, Ways
from pipermoe.specs.legality import copies_fit
from pipermoe.specs.strategy_table import StrategyTable

Price = Callable[[StrategyTable], NDArray[np.float64]]  # (rows, prices), of what the columns INSIDE say


class PriceList:
    """A `Price` that works each row out once: a few rows take formulas as long as thousands."""

    def __init__(self, price_of: Price) -> None:
        self._price_of = price_of
        self._places: dict[bytes, int] = {}
        self._known: list[NDArray[np.float64]] = []

    def __call__(self, table: StrategyTable) -> NDArray[np.float64]:
        keys = list(map(bytes, np.stack([getattr(table, name) for name in INSIDE], axis=1)))
        new = {key: row for row, key in enumerate(keys) if key not in self._places}
        if new:
            self._places |= {key: len(self._known) + place for place, key in enumerate(new)}
            self._known.extend(self._price_of(table.take(np.array(list(new.values())))))
        return np.stack([self._known[self._places[key]] for key in keys])


def cheapest(price_of: Price, ways: Ways) -> Price:
    """Of each price the least of all ways."""

    def least(table: StrategyTable) -> NDArray[np.float64]:
        each = price_of(in_each(ways, table)).reshape(len(ways), len(table), -1)
        return np.ascontiguousarray(each.min(axis=0))  # rows of it are taken often

    return least


def in_each(ways: Ways, table: StrategyTable) -> StrategyTable:
    """All rows in the first way, then all in the second, and so on; where there is no such way, a row as it is."""
    names = tuple(ways[0])
    own = table.take(np.tile(np.arange(len(table)), len(ways)))
    other = own.with_columns(**{name: np.repeat([way[name] for way in ways], len(table)) for name in names})
    exists = copies_fit(other)
    return own.with_columns(**{name: np.where(exists, getattr(other, name), getattr(own, name)) for name in names})

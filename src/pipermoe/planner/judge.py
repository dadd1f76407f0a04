"""What strategies of a space take and hold: floors, bounds, the simulated step and the peak, each worked out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipermoe.planner.axes import INSIDE_COLUMNS, LEVEL_COLUMNS, WAY_COLUMNS
from pipermoe.planner.exact import simulated_seconds
from pipermoe.planner.job import Job
from pipermoe.planner.space import Space
from pipermoe.resources.bound import step_bound
from pipermoe.resources.floor import floor_prices, grouped_floor
from pipermoe.resources.groups import Groups, Ways
from pipermoe.resources.kinds import distinct
from pipermoe.resources.memory import prices
from pipermoe.resources.peak import grouped_peak_bytes
from pipermoe.resources.price_list import Price, PriceList, cheapest
from pipermoe.resources.quick_bound import quick_bound
from pipermoe.resources.unit_seconds import unit_seconds
from pipermoe.specs.strategy_table import StrategyTable

Numbers = NDArray[np.int64]  # places of strategies, or branches
Figures = NDArray[np.float64]


class Judge:
    """No figure depends on the memory budget, so the searches for different budgets share them.

    Of heads and branches it is that of the best tail: of the `ways` and the `levels` that the space's tails have.
    """

    def __init__(self, job: Job, space: Space) -> None:
        self.job, self.space = job, space
        self._ways, self._levels, every_inside = (
            _values(space.tails, names) for names in (WAY_COLUMNS, LEVEL_COLUMNS, INSIDE_COLUMNS)
        )
        self._bytes = PriceList(partial(prices, job.model, job.train, imbalance=job.imbalance))
        self._least_bytes, self._branch_bytes, self._head_bytes = (
            PriceList(floor_prices(self._bytes, ways)) for ways in (({},), self._ways, every_inside)
        )
        of_units = partial(unit_seconds, job.model, job.platform, job.train, imbalance=job.imbalance)
        self._unit_seconds = PriceList(of_units)
        self._head_bounds: dict[int, float] = {}
        self._head_floors: dict[int, float] = {}
        self._branch_floors: dict[int, float] = {}
        self._branch_bounds: dict[int, float] = {}
        self._floors: dict[int, float] = {}
        self._bounds: dict[int, float] = {}
        self._peaks: dict[int, float] = {}
        self._seconds: dict[int, float] = {}

    def quick_bounds(self) -> Figures:
        """Seconds that no simulated step undercuts: of every head, soon found."""
        model, train, heads = self.job.model, self.job.train, self.space.heads
        price_of = cheapest(self._unit_seconds, self._ways)
        return quick_bound(Groups(model, train, heads), price_of) if len(heads) else np.zeros(0)

    def head_bounds(self, heads: Numbers) -> Figures:
        """Seconds that the simulated step of no strategy of each head undercuts."""
        return _known(
            self._head_bounds, heads, lambda new: self._bound(self.space.heads.take(new), self._ways, self._levels)
        )

    def head_floors(self, heads: Numbers) -> Figures:
        """Bytes that the peak of no strategy of each head undercuts: of each part what the best tail for it holds."""
        return _known(
            self._head_floors,
            heads,
            lambda new: self._floor(self.space.heads.take(new), self._head_bytes, self._levels),
        )

    def branch_floors(self, branches: Numbers) -> Figures:
        """Bytes that the peak of no strategy of each branch undercuts."""
        return _known(
            self._branch_floors, branches, lambda new: self._floor(self._table(new), self._branch_bytes, self._levels)
        )

    def branch_bounds(self, branches: Numbers) -> Figures:
        """Seconds that the simulated step of no strategy of each branch undercuts."""
        return _known(
            self._branch_bounds, branches, lambda new: self._bound(self._table(new), self._ways, self._levels)
        )

    def floors(self, places: Numbers) -> Figures:
        """Bytes that the peak of each place does not undercut."""
        return _known(self._floors, places, lambda new: self._floor(self.space.table(new), self._least_bytes))

    def bounds(self, places: Numbers) -> Figures:
        """Seconds that the simulated step of each place does not undercut: the step itself where it is known."""
        bounds = _known(self._bounds, places, lambda new: self._bound(self.space.table(new)))
        return np.maximum(bounds, [self._seconds.get(place, 0.0) for place in places.tolist()])

    def peaks(self, places: Numbers) -> Figures:
        """Bytes of the worst rank of each place."""
        model, train, space = self.job.model, self.job.train, self.space
        return _known(
            self._peaks,
            places,
            lambda new: grouped_peak_bytes(model, train, Groups(model, train, space.table(new)), self._bytes),
        )

    def seconds(self, places: Numbers) -> Figures:
        """The simulated step of each place."""
        return _known(self._seconds, places, lambda new: simulated_seconds(self.job, self.space.table(new)))

    def _table(self, branches: Numbers) -> StrategyTable:
        """The first strategy of each branch."""
        return self.space.table(branches * self.space.tails_of_branch)

    def _floor(self, table: StrategyTable, price_of: Price, levels: Ways = ({},)) -> Figures:
        model, train = self.job.model, self.job.train
        return grouped_floor(model, train, Groups(model, train, table), price_of, levels)

    def _bound(self, table: StrategyTable, ways: Ways = ({},), levels: Ways = ({},)) -> Figures:
        job, price = self.job, self._unit_seconds
        return step_bound(
            job.model, job.platform, job.train, table, job.imbalance, ways=ways, levels=levels, price_of=price
        )


def _known(known: dict[int, float], numbers: Numbers, ask: Callable[[Numbers], Figures]) -> Figures:
    """The figure of each number; `ask` is asked for those not yet `known`."""
    new = [number for number in numbers.tolist() if number not in known]
    if new:
        known.update(zip(new, ask(np.array(new)).tolist(), strict=True))
    return np.array([known[number] for number in numbers.tolist()])


def _values(tails: StrategyTable, names: Sequence[str]) -> Ways:
    """The different values that tails have in the columns `names`."""
    rows = distinct([getattr(tails, name) for name in names]).rows
    return [{name: int(getattr(tails, name)[row]) for name in names} for row in rows]

"""What strategies of a space take and hold: bounds, and the simulated step and the peak, each worked out once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipermoe.planner.exact import simulated_seconds
from pipermoe.planner.job import Job
from pipermoe.planner.space import Space
from pipermoe.resources.bound import step_bound
from pipermoe.resources.groups import Groups, Ways
from pipermoe.resources.memory import prices
from pipermoe.resources.peak import grouped_peak_bytes, memory_floor
from pipermoe.resources.price_list import PriceList
from pipermoe.resources.unit_seconds import unit_seconds
from pipermoe.specs.strategy_table import StrategyTable

Places = NDArray[np.int64]
Figures = NDArray[np.float64]


class Judge:
    """No figure depends on the memory budget, so the searches for different budgets share them."""

    def __init__(self, job: Job, space: Space) -> None:
        self.job, self.space = job, space
        self._bytes = PriceList(partial(prices, job.model, job.train, imbalance=job.imbalance))
        of_units = partial(unit_seconds, job.model, job.platform, job.train, imbalance=job.imbalance)
        self._unit_seconds = PriceList(of_units)
        self._peaks: dict[int, float] = {}
        self._seconds: dict[int, float] = {}

    def floor(self, table: StrategyTable, ways: Ways = ({},), levels: Ways = ({},)) -> Figures:
        """Bytes that the peak of no row undercuts, by the `ways` and `levels` that hold least."""
        job = self.job
        return memory_floor(job.model, job.train, table, job.imbalance, ways=ways, levels=levels, price_of=self._bytes)

    def bound(self, table: StrategyTable, ways: Ways = ({},), levels: Ways = ({},)) -> Figures:
        """Seconds that the simulated step of no row undercuts, in the `ways` and at the `levels` that take least."""
        job, price = self.job, self._unit_seconds
        return step_bound(
            job.model, job.platform, job.train, table, job.imbalance, ways=ways, levels=levels, price_of=price
        )

    def peaks(self, places: Places) -> Figures:
        """Bytes of the worst rank of each place."""
        model, train = self.job.model, self.job.train
        return self._known(
            self._peaks, places, lambda t: grouped_peak_bytes(model, train, Groups(model, train, t), self._bytes)
        )

    def seconds(self, places: Places) -> Figures:
        """The simulated step of each place."""
        return self._known(self._seconds, places, lambda t: simulated_seconds(self.job, t))

    def at_least(self, places: Places) -> Figures:
        """The simulated step where it is known, 0 where it is not."""
        return np.array([self._seconds.get(place, 0.0) for place in places.tolist()])

    def _known(self, known: dict[int, float], places: Places, ask: Callable[[StrategyTable], Figures]) -> Figures:
        new = [place for place in places.tolist() if place not in known]
        if new:
            known.update(zip(new, ask(self.space.table(np.array(new))).tolist(), strict=True))
        return np.array([known[place] for place in places.tolist()])

"""What strategies of a space take and hold: bounds, the simulated step, floors and the peak, each worked out once.

No figure depends on the memory budget, so the searches for different budgets share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from pipermoe.planner.axes import INSIDE_COLUMNS, LEVEL_COLUMNS, WAY_COLUMNS
from pipermoe.planner.exact import simulated_seconds
from pipermoe.planner.job import Job
from pipermoe.planner.known import Figures, Known, Numbers
from pipermoe.planner.space import Space
from pipermoe.resources.bound import step_bound
from pipermoe.resources.floor import floor_prices, grouped_floor
from pipermoe.resources.groups import Groups, Ways
from pipermoe.resources.kinds import distinct
from pipermoe.resources.memory import EXPERTS, prices
from pipermoe.resources.peak import grouped_peak_bytes
from pipermoe.resources.price_list import Price, PriceList, cheapest
from pipermoe.resources.quick_bound import quick_bound
from pipermoe.resources.unit_seconds import unit_seconds
from pipermoe.specs.strategy_table import StrategyTable


class Steps:
    """Seconds of steps: lower bounds that no simulation undercuts, and the simulated step.

    Of heads and branches it is that of the best tail: of the `ways` and the `levels` that the space's tails have.
    """

    def __init__(self, job: Job, space: Space) -> None:
        self.job, self.space = job, space
        self._ways, self._levels = (_values(space.tails, names) for names in (WAY_COLUMNS, LEVEL_COLUMNS))
        of_units = partial(unit_seconds, job.model, job.platform, job.train, imbalance=job.imbalance)
        self._unit_seconds = PriceList(of_units)
        self.head_bounds = Known(lambda heads: self._bound(space.heads.take(heads), self._ways, self._levels))
        self.branch_bounds = Known(lambda branches: self._bound(space.branch_table(branches), self._ways, self._levels))
        self._bounds = Known(lambda places: self._bound(space.table(places)))
        self.seconds = Known(lambda places: simulated_seconds(job, space.table(places)))

    def quick_bounds(self) -> Figures:
        """Of every head, soon found."""
        heads = self.space.heads
        price_of = cheapest(self._unit_seconds, self._ways)
        return quick_bound(Groups(self.job.model, self.job.train, heads), price_of) if len(heads) else np.zeros(0)

    def bounds(self, places: Numbers) -> Figures:
        """Of each place: the step itself where it is known."""
        return np.fmax(self._bounds(places), self.seconds.so_far(places))

    def _bound(self, table: StrategyTable, ways: Ways = ({},), levels: Ways = ({},)) -> Figures:
        job, price = self.job, self._unit_seconds
        return step_bound(
            job.model, job.platform, job.train, table, job.imbalance, ways=ways, levels=levels, price_of=price
        )


class Peaks:
    """Bytes at the peak of the worst rank: floors that no peak undercuts, and the peak itself.

    Of heads and branches it is that of the best tail, as for `Steps`; of each part of a stage, and of the states, what
    the best tail for it holds. Nothing depends on the machine.
    """

    def __init__(self, job: Job, space: Space) -> None:
        self.job = job
        held = [name for name in INSIDE_COLUMNS if name in EXPERTS]  # what memory reads: not who moves the bytes
        ways = _values(space.tails, [name for name in held if name in WAY_COLUMNS])
        levels, every_inside = _values(space.tails, LEVEL_COLUMNS), _values(space.tails, held)
        exact = PriceList(partial(prices, job.model, job.train, imbalance=job.imbalance))
        of_place, of_branch, of_head = (PriceList(floor_prices(exact, each)) for each in (({},), ways, every_inside))
        self.head_floors = Known(lambda heads: self._floor(space.heads.take(heads), of_head, levels))
        self.branch_floors = Known(lambda branches: self._floor(space.branch_table(branches), of_branch, levels))
        self.floors = Known(lambda places: self._floor(space.table(places), of_place))
        self.peaks = Known(
            lambda places: grouped_peak_bytes(job.model, job.train, self._groups(space.table(places)), exact)
        )

    def _floor(self, table: StrategyTable, price_of: Price, levels: Ways = ({},)) -> Figures:
        return grouped_floor(self.job.model, self.job.train, self._groups(table), price_of, levels)

    def _groups(self, table: StrategyTable) -> Groups:
        return Groups(self.job.model, self.job.train, table)


def _values(tails: StrategyTable, names: Sequence[str]) -> Ways:
    """The different values that tails have in the columns `names`."""
    rows = distinct([getattr(tails, name) for name in names]).rows
    return [{name: int(getattr(tails, name)[row]) for name in names} for row in rows]

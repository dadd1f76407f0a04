"""The exact search: best first, over the heads, branches and strategies of a space.

Heads come in the order of quick bounds, those that could win in the order of better ones. A head that could still win
is divided into its branches, a branch that could still win is written out with its tails; a strategy that could still
win is weighed, and if it fits simulated. The search ends when no bound is below the last of the ranking. Because no
simulation undercuts its bound, the ranking is that of simulating every strategy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipermoe.planner.exact import schedule_kinds
from pipermoe.planner.job import Job
from pipermoe.planner.judge import Peaks, Steps
from pipermoe.planner.pool import Pool
from pipermoe.planner.space import Selection, Space, job_space
from pipermoe.planner.splits import balanced_splits
from pipermoe.resources.floor import memory_floor
from pipermoe.resources.peak import peak_bytes

ROUNDING = 1e-9  # bounds and simulations add up in different orders
DIGITS = 9  # of a step that rank it
NEAR = 1.05  # the bounds of strategies of one schedule that are weighed or simulated together
HEADS_WEIGHED, WEIGHED, WEIGHED_AT_ONCE = 1 << 14, 512, 32  # where nothing fits


class Found(NamedTuple):
    """A simulated strategy; `ranked` is its step without the digits that only rounding tells apart.

    Equal ones are ranked by memory, then by place: the plainest schedule first, and the answer is always the same.
    """

    ranked: float
    peak_bytes: float
    place: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """The fastest strategies, best first, and what became of all others of the selection.

    No other one precedes those of `best`; `others` are the fastest of what was simulated to prove it.
    """

    best: tuple[Found, ...]
    others: tuple[Found, ...]
    not_fitting: int
    pruned: int
    simulated: int


@dataclass(frozen=True, slots=True)
class Field:
    """A searched space with a quick lower bound of every head under any of its tails; arrays (heads,)."""

    job: Job
    space: Space
    bound: NDArray[np.float64]
    steps: Steps
    peaks: Peaks

    @classmethod
    def of(cls, job: Job) -> Field:
        space = job_space(job, balanced_splits(job.model, job.platform, job.train, job.world_size))
        steps = Steps(job, space)
        return cls(job, space, steps.quick_bounds(), steps, Peaks(job, space))

    def best(
        self, count: int = 1, selection: Selection | None = None, memory_budget_bytes: float | None = None
    ) -> Ranking:
        """The `count` fastest of the selected strategies that fit the budget (default: the job's), exactly ranked."""
        budget = self.job.memory_budget_bytes if memory_budget_bytes is None else memory_budget_bytes
        return _Search(self, selection or self.space.select(), budget, count).run()

    def promising(self, selection: Selection | None = None) -> int:
        """The place of the fitting strategy with the lowest bound, not simulated; -1 if none fits."""
        return _Search(self, selection or self.space.select(), self.job.memory_budget_bytes, 1).lowest_bound()

    def smallest(self, selection: Selection | None = None) -> int:
        """The place of the strategy that holds least at its peak, the first of equals; -1 if none is selected."""
        return smallest(self.job, self.space, selection or self.space.select())


def smallest(job: Job, space: Space, selection: Selection) -> int:
    """Of the smallest selected micro-batch, and what recomputes most, the place that holds least; -1 if there is none.

    Those that hold least at the least are weighed, schedule by schedule: some have thousands of actions to go through.
    """
    size = space.heads.micro_batch_size
    least = size == size[selection.heads].min(initial=size.max(initial=1))
    most = space.tails.recompute == space.tails.recompute[selection.tails].max(initial=0)
    narrow = Selection(selection.heads & least, selection.tails & most)
    heads = np.flatnonzero(narrow.heads)
    candidates = Pool.of()
    for start in range(0, len(heads), HEADS_WEIGHED):
        places = space.places(heads[start : start + HEADS_WEIGHED], narrow)
        candidates.add(places, memory_floor(job.model, job.train, space.table(places), job.imbalance))
        candidates = Pool(candidates.items[:WEIGHED], candidates.bounds[:WEIGHED])
    least, best = np.inf, -1
    while candidates.least < least:
        near = space.table(candidates.items[:WEIGHED_AT_ONCE])
        places, _ = candidates.remove(_of_first_kind(schedule_kinds(job, near), len(candidates)))
        peaks = peak_bytes(job.model, job.train, space.table(places), imbalance=job.imbalance)
        least, best = min((least, best), *zip(peaks.tolist(), places.tolist(), strict=True))
    return best


def _of_first_kind(kinds: NDArray, count: int) -> NDArray[np.bool_]:
    """Of `count` items whose first have these kinds, which are known to be of that of the first one."""
    same = np.zeros(count, dtype=bool)
    same[: len(kinds)] = kinds == kinds[0]
    return same


class _Search:
    """One run: pools of heads, branches and places in the order of their bounds; those of `fitting` are weighed."""

    def __init__(self, field: Field, selection: Selection, budget: float, count: int) -> None:
        self.job, self.space, self.steps, self.peaks = field.job, field.space, field.steps, field.peaks
        self.selection, self.budget, self.count = selection, budget, count
        chosen = np.flatnonzero(selection.heads)
        self.unseen = Pool.of(chosen, field.bound[chosen] * (1 - ROUNDING))
        self.heads, self.branches, self.places, self.fitting = Pool.of(), Pool.of(), Pool.of(), Pool.of()
        self.found: list[Found] = []
        self.not_fitting = 0

    def run(self) -> Ranking:
        while self._advance():
            self._simulate(self._same_schedule(self.fitting)[0])
        pruned = self.space.count(self.selection) - self.not_fitting - len(self.found)
        best, others = self.found[: self.count], self.found[self.count :]
        return Ranking(tuple(best), tuple(others), self.not_fitting, pruned, len(self.found))

    def lowest_bound(self) -> int:
        """The place of the strategy with the lowest bound; -1 if none fits."""
        return int(self.fitting.items[0]) if self._advance() else -1

    @property
    def worst(self) -> float:
        """What a bound has to undercut."""
        if len(self.found) < self.count:
            return np.inf
        return self.found[self.count - 1].seconds * (1 - self.job.tolerance)

    def _advance(self) -> bool:
        """Write out and weigh what could win until a strategy that fits comes first; False if none could win."""
        pools = (self.fitting, self.places, self.branches, self.heads, self.unseen)
        while True:
            first = min(pools, key=lambda pool: pool.least)
            if first.least > self.worst or not len(first):
                return False
            if first is self.fitting:
                return True
            if first is self.places:
                self._weigh()
            elif first is self.branches:
                self._write_out(self.branches.take_more(self.worst))
            elif first is self.heads:
                self._divide(self.heads.take_more(self.worst))
            else:
                self._look_at(self.unseen.take_more(self.worst))

    def _look_at(self, heads: NDArray) -> None:
        """Bound `heads` better."""
        self.heads.add(heads, self.steps.head_bounds(heads) * (1 - ROUNDING))

    def _divide(self, heads: NDArray) -> None:
        """The branches of `heads`, but those that would not fit with any tail."""
        may_fit = self._may_fit(self.peaks.head_floors, heads)
        self.not_fitting += len(self.space.places(heads[~may_fit], self.selection))
        branches, strategies = self.space.branches(heads[may_fit], self.selection)
        fits = self._may_fit(self.peaks.branch_floors, branches)
        self.not_fitting += int(strategies[~fits].sum())
        self.branches.add(branches[fits], self.steps.branch_bounds(branches[fits]) * (1 - ROUNDING))

    def _write_out(self, branches: NDArray) -> None:
        """The strategies of `branches`, but those that no order of the schedule could make fit."""
        places = self.space.places_of(branches, self.selection)
        fits = self._may_fit(self.peaks.floors, places)
        self.not_fitting += int(np.count_nonzero(~fits))
        self.places.add(places[fits], self.steps.bounds(places[fits]) * (1 - ROUNDING))

    def _may_fit(self, floors: Callable[[NDArray], NDArray], numbers: NDArray) -> NDArray[np.bool_]:
        """Whose floors fit; without a limit none has to be known."""
        return np.ones(len(numbers), dtype=bool) if np.isinf(self.budget) else floors(numbers) <= self.budget

    def _weigh(self) -> None:
        """Weigh the first place, and with it those of the same schedule that could win."""
        places, bounds = self._same_schedule(self.places)
        fits = self.peaks.peaks(places) <= self.budget
        self.not_fitting += int(np.count_nonzero(~fits))
        self.fitting.add(places[fits], bounds[fits])

    def _same_schedule(self, pool: Pool) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The first item of a pool of places, and with it those of its schedule whose turn may come; they leave it."""
        near = slice(0, int(np.searchsorted(pool.bounds, min(self.worst, pool.least * NEAR), side="right")))
        kinds = schedule_kinds(self.job, self.space.table(pool.items[near]))
        return pool.remove(_of_first_kind(kinds, len(pool)))

    def _simulate(self, places: NDArray) -> None:
        seconds, peaks = self.steps.seconds(places), self.peaks.peaks(places)
        ranked = [float(f"{each:.{DIGITS}g}") for each in seconds]
        found = map(Found, ranked, peaks.tolist(), places.tolist(), seconds.tolist())
        self.found = sorted([*self.found, *found])

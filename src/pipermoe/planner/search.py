"""The exact search: branch and bound over the heads and tails of a space.

Heads come in the order of their lower bounds. A head that could still win is written out with its tails; of these
strategies what does not fit is dropped, the rest is simulated in the order of its own bounds, until no bound is below
the last of the ranking. Because no simulation undercuts its bound, the ranking is that of simulating every strategy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipermoe.planner.space import Selection, Space, job_space
from pipermoe.resources.evaluate import evaluate, peak_bytes, pipeline_bound
from pipermoe.resources.step import step_costs, step_seconds_by_term
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig

ROUNDING = 1e-9  # bounds and simulations add up in different orders
FIRST_HEADS = 64  # that are written out at once; then twice as many each time


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a search is about; `imbalance` is the busiest rank's rows over the mean."""

    model: ModelSpec
    platform: Platform
    train: TrainConfig
    world_size: int
    memory_budget_bytes: int
    imbalance: float = 1.0


class Found(NamedTuple):
    """A simulated strategy; equal times are ranked by memory, then by place, so that the answer is always the same."""

    seconds: float
    peak_bytes: float
    place: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """The fastest strategies, best first, and what became of all others of the selection."""

    best: tuple[Found, ...]
    not_fitting: int
    pruned: int
    simulated: int


@dataclass(frozen=True, slots=True)
class Field:
    """A searched space with the lower bound of every head under any of its tails; arrays (heads,)."""

    job: Job
    space: Space
    bound: NDArray[np.float64]

    @classmethod
    def of(cls, job: Job) -> Field:
        space = job_space(job.model, job.train, job.world_size)
        return cls(job, space, head_bounds(job, space))

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
        selection = selection or self.space.select()
        places = self.space.places(np.flatnonzero(selection.heads), selection)
        peaks = peak_bytes(self.job.model, self.job.train, self.space.table(places), imbalance=self.job.imbalance)
        return int(places[np.argmin(peaks)]) if len(places) else -1


def head_bounds(job: Job, space: Space) -> NDArray[np.float64]:
    """Seconds (heads,) that no strategy of a head undercuts: the pipeline without recomputation, however dispatched."""
    bound = np.full(len(space.heads), np.inf)
    for dispatcher, exchange in sorted({*zip(space.tails.dispatcher, space.tails.exchange, strict=True)}):
        columns = {"dispatcher": dispatcher, "exchange": exchange}
        table = space.heads.with_columns(**{name: np.full(len(bound), code) for name, code in columns.items()})
        bound = np.minimum(bound, pipeline_bound(job.model, job.platform, job.train, table, job.imbalance))
    return bound


def exact_seconds(job: Job, strategy: Strategy) -> float:
    """The simulated step seconds of one strategy."""
    table = StrategyTable.of([strategy])
    costs = step_costs(job.model, job.platform, job.train, table, job.imbalance)
    return step_seconds_by_term(job.platform, job.train, strategy, costs)[0]


class _Search:
    """One run of branch and bound. Open strategies are written out and fit, but are not simulated yet."""

    def __init__(self, field: Field, selection: Selection, budget: float, count: int) -> None:
        self.field, self.selection, self.budget, self.count = field, selection, budget, count
        self.best: list[Found] = []
        self.open_places, self.open_peaks, self.open_bounds = np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0)
        self.not_fitting = self.simulated = 0

    def run(self) -> Ranking:
        selection, space = self.selection, self.field.space
        for heads, next_bound in self._waves(np.flatnonzero(selection.heads)):
            self._open(heads)
            self._simulate_below(next_bound)
            if next_bound * (1 - ROUNDING) > self.worst:
                break
        total = int(selection.heads.sum() * selection.tails.sum()) - space.redundant(selection)
        pruned = total - self.not_fitting - self.simulated
        return Ranking(tuple(self.best), self.not_fitting, pruned, self.simulated)

    def lowest_bound(self) -> int:
        """The place of the strategy with the lowest bound; -1 if none fits."""
        for heads, next_bound in self._waves(np.flatnonzero(self.selection.heads)):
            self._open(heads)
            if len(self.open_places) and self.open_bounds[0] <= next_bound:
                break
        return int(self.open_places[0]) if len(self.open_places) else -1

    @property
    def worst(self) -> float:
        """What a strategy has to undercut."""
        return self.best[-1].seconds if len(self.best) == self.count else np.inf

    def _waves(self, heads: NDArray) -> Iterator[tuple[NDArray, float]]:
        """Heads in the order of their bounds, and the bound of the first head that comes after them."""
        bound = self.field.bound[heads]
        order = np.argsort(bound, kind="stable")
        start, size = 0, FIRST_HEADS
        while start < len(order):
            following = order[start + size : start + size + 1]
            yield heads[order[start : start + size]], float(bound[following[0]]) if len(following) else np.inf
            start, size = start + size, 2 * size

    def _open(self, heads: NDArray) -> None:
        """Write out the strategies of `heads`; keep those that fit."""
        job, space = self.field.job, self.field.space
        places = space.places(heads, self.selection)
        table = space.table(places)
        found = evaluate(job.model, job.platform, job.train, table, job.imbalance)
        fits = found.peak_bytes <= self.budget
        self.not_fitting += int(np.count_nonzero(~fits))
        places = np.concatenate([self.open_places, places[fits]])
        peaks = np.concatenate([self.open_peaks, found.peak_bytes[fits]])
        bounds = np.concatenate([self.open_bounds, found.bound[fits]])
        order = np.lexsort((places, peaks, bounds))
        self.open_places, self.open_peaks, self.open_bounds = places[order], peaks[order], bounds[order]

    def _simulate_below(self, limit: float) -> None:
        """Simulate the open strategies in the order of their bounds, up to `limit` or the last of the ranking."""
        done = 0
        for place, peak, bound in zip(self.open_places, self.open_peaks, self.open_bounds, strict=True):
            if bound * (1 - ROUNDING) > min(limit, self.worst):
                break
            done += 1
            seconds = exact_seconds(self.field.job, self.field.space.strategy(int(place)))
            self.best = sorted([*self.best, Found(seconds, float(peak), int(place))])[: self.count]
        self.simulated += done
        self.open_places, self.open_peaks = self.open_places[done:], self.open_peaks[done:]
        self.open_bounds = self.open_bounds[done:]

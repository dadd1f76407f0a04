"""The exact search: drop what is illegal or cannot fit, order by lower bound, simulate until no bound can win.

Because no simulation undercuts its bound, the ranking is that of simulating every strategy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.planner.space import all_combinations, redundant_mask
from pipermoe.resources.evaluate import peak_bytes
from pipermoe.resources.step import (
    StepCosts,
    lower_bound,
    step_costs,
    step_seconds_by_term,
    uniform_groups,
)
from pipermoe.specs.legality import legal_mask
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a search is about; `imbalance` is the busiest rank's rows over the mean."""

    model: ModelSpec
    platform: Platform
    train: TrainConfig
    world_size: int
    memory_budget_bytes: int
    imbalance: float = 1.0


@dataclass(frozen=True, slots=True)
class Space:
    """The legal strategies that differ from each other, with their peak memory; arrays (rows,)."""

    table: StrategyTable
    considered: int
    illegal: int
    redundant: int
    peak_bytes: NDArray

    def __len__(self) -> int:
        return len(self.table)


def search_space(job: Job) -> Space:
    """Enumerate, judge and weigh every strategy of the job."""
    everything = all_combinations(job.train, job.world_size)
    legal = everything.take(legal_mask(everything, job.model, job.train, job.world_size))
    table = legal.take(~redundant_mask(legal))
    return Space(
        table=table,
        considered=len(everything),
        illegal=len(everything) - len(legal),
        redundant=len(legal) - len(table),
        peak_bytes=peak_bytes(job.model, job.train, table, imbalance=job.imbalance),
    )


def bounds(job: Job, table: StrategyTable) -> NDArray:
    """A lower bound of every row's step seconds."""
    bound = np.zeros(len(table))
    for rows, group in uniform_groups(table):
        costs = step_costs(job.model, job.platform, job.train, group, job.imbalance)
        bound[rows] = lower_bound(job.platform, job.train, group, costs)
    return bound


def exact_seconds(job: Job, strategy: Strategy) -> float:
    """The simulated step seconds of one strategy."""
    table = StrategyTable.of([strategy])
    costs: StepCosts = step_costs(job.model, job.platform, job.train, table, job.imbalance)
    return step_seconds_by_term(job.platform, job.train, strategy, costs)[0]


@dataclass(frozen=True, slots=True)
class Ranking:
    """The fastest strategies, best first, as (row, step seconds); and how many were simulated to be sure."""

    rows: tuple[tuple[int, float], ...]
    simulated: int


def fastest(job: Job, space: Space, rows: NDArray, bound: NDArray, count: int) -> Ranking:
    """The `count` fastest of `rows`, exactly. `bound` holds the lower bounds of these rows.

    Equal times are ranked by memory, then by the order of the space, so that the answer is always the same.
    """
    order = np.lexsort((rows, space.peak_bytes[rows], bound))
    best: list[tuple[float, float, int]] = []
    simulated = 0
    for index in order.tolist():
        if len(best) == count and bound[index] > best[-1][0]:
            break
        row = int(rows[index])
        seconds = exact_seconds(job, space.table.row(row))
        simulated += 1
        best = sorted([*best, (seconds, float(space.peak_bytes[row]), row)])[:count]
    return Ranking(tuple((row, seconds) for seconds, _, row in best), simulated)

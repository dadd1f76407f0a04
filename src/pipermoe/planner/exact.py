"""The simulated step of many strategies: those of one schedule in one walk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipermoe.planner.job import Job
from pipermoe.resources.kinds import distinct
from pipermoe.resources.step import close_step, compute_slots, cost_rows, durations_of, schedule_of, step_costs
from pipermoe.schedule.batch import end_seconds
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.shared_host import simulate_shared_host
from pipermoe.schedule.timeline import simulate
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable

FEW = 2  # candidates that are simulated sooner one after the other


def schedule_kinds(job: Job, table: StrategyTable) -> NDArray[np.int64]:
    """A number for every row: the same for rows of one pipeline, for as many micro-batches."""
    columns = (table.schedule, table.pipeline_parallel, table.virtual_stages, table.layer_split)
    return distinct([*columns, table.microbatches(job.train.global_batch_size)]).of


def exact_seconds(job: Job, strategy: Strategy) -> float:
    """The simulated step seconds of one strategy."""
    return float(simulated_seconds(job, StrategyTable.of([strategy]))[0])


def simulated_seconds(job: Job, table: StrategyTable) -> NDArray[np.float64]:
    """The simulated step seconds of every row, to the bit what `predict` gives for it alone."""
    kinds = schedule_kinds(job, table)
    seconds = np.zeros(len(table))
    for kind in range(kinds.max(initial=-1) + 1):
        rows = np.flatnonzero(kinds == kind)
        seconds[rows] = _of_one_schedule(job, table.take(rows))
    return seconds


def _of_one_schedule(job: Job, table: StrategyTable) -> list[float]:
    """Strategies that differ in their tails only often have the same durations: these are simulated once."""
    first = table.row(0)
    rows = cost_rows(step_costs(job.model, job.platform, job.train, table, job.imbalance))
    numbers: dict[Durations, int] = {}
    number = [numbers.setdefault(durations_of(row, first.num_stages), len(numbers)) for row in rows]
    ends, slots = _ends(job, first, list(numbers)), compute_slots(job.platform, first.world_size)
    return [max(close_step(ends[n], row, slots, first.ranks_per_stage)[2]) for n, row in zip(number, rows, strict=True)]


def _ends(job: Job, strategy: Strategy, candidates: Sequence[Durations]) -> list[list[float]]:
    """When each rank ends its last action: of every candidate."""
    schedule = schedule_of(strategy, job.train.global_batch_size)
    slots = compute_slots(job.platform, strategy.world_size)
    if slots < strategy.world_size:
        timelines = (simulate_shared_host(schedule, each, slots, strategy.ranks_per_stage) for each in candidates)
    elif len(candidates) > FEW:
        return end_seconds(schedule, candidates).tolist()
    else:
        timelines = (simulate(schedule, each) for each in candidates)
    return [[max(ends) for ends in timeline.end] for timeline in timelines]

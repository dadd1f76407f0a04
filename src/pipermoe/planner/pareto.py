"""The front of step time against memory: strategies that no other beats in both."""

from __future__ import annotations

from pipermoe.planner.candidate import candidate
from pipermoe.planner.result import Candidate
from pipermoe.planner.search import Field

STEP = 0.02  # points nearer to each other in memory are one


def pareto_front(field: Field) -> tuple[Candidate, ...]:
    """From the fastest strategy that fits to the smallest one.

    Each point is the fastest below the memory of the one before; a point saves at least 2 % of memory.
    """
    job, front, budget = field.job, [], float(field.job.memory_budget_bytes)
    while (ranking := field.best(memory_budget_bytes=budget)).best:
        [found] = ranking.best
        front.append(candidate(job, field.space.strategy(found.place)))
        budget = (1 - STEP) * found.peak_bytes
    return tuple(front)

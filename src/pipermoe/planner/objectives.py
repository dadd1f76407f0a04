"""What "best" means: the fastest step, or the most memory to spare among strategies that are nearly as fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from pipermoe.planner.search import Field, Ranking

Objective = Literal["step-time", "memory"]
NEARLY = 1.05  # of the fastest step


def fastest(field: Field, count: int) -> Ranking:
    """The fastest steps; at a given number of devices also the most tokens per second of each, and the fewest hours."""
    ranking = field.best()
    return replace(ranking, best=(ranking.best + ranking.others)[:count])


def most_headroom(field: Field, count: int) -> Ranking:
    """The smallest peaks among strategies whose step is at most 5 % longer than the fastest.

    The budget is lowered below the best peak until nothing nearly as fast fits; the last found are the smallest.
    """
    ranking = found = field.best()
    rows = []
    while found.best and found.best[0].seconds <= ranking.best[0].seconds * NEARLY:
        rows.append(found.best[0])
        found = field.best(memory_budget_bytes=found.best[0].peak_bytes - 1)
    return replace(ranking, best=tuple(reversed(rows))[:count])


OBJECTIVES: dict[Objective, Callable[[Field, int], Ranking]] = {"step-time": fastest, "memory": most_headroom}

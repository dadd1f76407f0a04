"""What a step says of its expert layout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BalanceLine:
    """`steps.jsonl` has one for every step of a run whose experts may move.

    `rank_load`: for every MoE layer rows of the busiest rank over the mean, if copies share evenly. `moved`: copies
    that ranks did not have before, taken up at the end of this step, in `move_seconds`. `planning_seconds`: of the last
    plan. The others count plans of the whole run: `kept` did not pay, `abandoned` were not ready in time.
    """

    version: int
    rank_load: tuple[float, ...]
    moved: int
    move_seconds: float
    planning_seconds: float | None
    kept: int
    abandoned: int

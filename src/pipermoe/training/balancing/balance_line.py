"""What a step says of its expert layout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BalanceLine:
    """`steps.jsonl` has one for every step of a run with a layout: experts may move, or rows spill.

    `rank_load`: for every MoE layer rows that the busiest rank computed over the mean, over micro-batches. `spilled`:
    copies for single micro-batches. `moved`: copies that ranks did not have before, taken up at the end of this step,
    in `move_seconds`. `planning_seconds`: of the last plan. The others count plans of the whole run: `kept` did not
    pay, `abandoned` were not ready in time.
    """

    rank_load: tuple[float, ...]
    spilled: int
    version: int = 0
    moved: int = 0
    move_seconds: float = 0.0
    planning_seconds: float | None = None
    kept: int = 0
    abandoned: int = 0

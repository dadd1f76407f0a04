"""What can be said of a named schedule whatever the number of micro-batches: read off a short one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pipermoe.schedule.action import Kind
from pipermoe.schedule.builders import RECIPES, build


@dataclass(frozen=True, slots=True)
class Traits:
    """`stages_of[rank]` are the stages of every rank; `mirrored`: every stage has two homes (DualPipe)."""

    stages_of: tuple[tuple[int, ...], ...]
    splits_backward: bool
    overlaps: bool
    mirrored: bool


@lru_cache(maxsize=4096)
def schedule_traits(name: str, pipeline_parallel: int, virtual_stages: int) -> Traits:
    """The traits of a schedule. Raises UserError where it does not exist for these numbers."""
    recipe = RECIPES[name]
    least = max(2 * pipeline_parallel, recipe.microbatches_per_rank * pipeline_parallel, recipe.microbatches_step)
    schedule = build(name, pipeline_parallel, least, virtual_stages)
    return Traits(
        stages_of=tuple(schedule.stages_of(rank) for rank in range(schedule.num_ranks)),
        splits_backward=schedule.splits_backward,
        overlaps=any(action.kind is Kind.OVERLAP for actions in schedule.ranks for action in actions),
        mirrored=bool(schedule.mirror_rank),
    )


def stages_of_ranks(name: str, pipeline_parallel: int, virtual_stages: int) -> tuple[tuple[int, ...], ...]:
    """The stages of every pipeline rank."""
    return schedule_traits(name, pipeline_parallel, virtual_stages).stages_of

"""What can be said of a named schedule without building it: which stages a rank holds, and its kinds of actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pipermoe.schedule.action import Kind
from pipermoe.schedule.builders import RECIPES, Homes, build

SAMPLE_RANKS, SAMPLE_MICROBATCHES = 2, 4  # of the pipeline in which every kind of action of a schedule occurs


@dataclass(frozen=True, slots=True)
class Traits:
    """`stages_of[rank]` are the stages of every rank; `mirrored`: every stage has two homes (DualPipe).

    `splits_backward` and `overlaps` hold for the schedule in general: a very short one may have no such action.
    """

    stages_of: Homes
    splits_backward: bool
    overlaps: bool
    mirrored: bool


@lru_cache(maxsize=4096)
def schedule_traits(name: str, pipeline_parallel: int, virtual_stages: int) -> Traits:
    """The traits of a schedule."""
    splits_backward, overlaps, mirrored = _kinds(name)
    return Traits(stages_of_ranks(name, pipeline_parallel, virtual_stages), splits_backward, overlaps, mirrored)


def stages_of_ranks(name: str, pipeline_parallel: int, virtual_stages: int) -> Homes:
    """The stages of every pipeline rank."""
    return RECIPES[name].homes(pipeline_parallel, virtual_stages)


def ways(stages_of: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The rank of every stage on the way of a micro-batch; where stages have two homes, both ways."""
    home = {stage: rank for rank, stages in enumerate(stages_of) for stage in stages}
    if len(home) == sum(map(len, stages_of)):
        return (tuple(home[stage] for stage in range(len(home))),)
    there = tuple(range(len(stages_of)))
    return there, there[::-1]


@lru_cache(maxsize=len(RECIPES))
def _kinds(name: str) -> tuple[bool, bool, bool]:
    schedule = build(name, SAMPLE_RANKS, SAMPLE_MICROBATCHES, RECIPES[name].virtual_stages[0])
    overlaps = any(action.kind is Kind.OVERLAP for actions in schedule.ranks for action in actions)
    return schedule.splits_backward, overlaps, bool(schedule.mirror_rank)

"""The two classics with one stage per rank: GPipe and 1F1B."""

from __future__ import annotations

from collections.abc import Iterator

from pipermoe.schedule.action import Action, Kind, Schedule

F, B = Kind.FORWARD, Kind.BACKWARD


def gpipe(pipeline_parallel: int, microbatches: int, virtual_stages: int = 1) -> Schedule:
    """All forwards, then all backwards in the same order (Huang et al. 2019, arXiv 1811.06965, figure 2c)."""

    def order(stage: int) -> Iterator[Action]:
        yield from (Action(F, stage, m) for m in range(microbatches))
        yield from (Action(B, stage, m) for m in range(microbatches))

    return Schedule.of("gpipe", microbatches, range(pipeline_parallel), map(order, range(pipeline_parallel)))


def one_f_one_b(pipeline_parallel: int, microbatches: int, virtual_stages: int = 1) -> Schedule:
    """Warm up with forwards, then alternate, then drain (Narayanan et al. 2021, arXiv 2104.04473, figure 4 top)."""

    def order(stage: int) -> Iterator[Action]:
        warm_up = min(pipeline_parallel - 1 - stage, microbatches)
        for m in range(warm_up):
            yield Action(F, stage, m)
        for m in range(warm_up, microbatches):
            yield Action(F, stage, m)
            yield Action(B, stage, m - warm_up)
        for m in range(microbatches - warm_up, microbatches):
            yield Action(B, stage, m)

    return Schedule.of("1f1b", microbatches, range(pipeline_parallel), map(order, range(pipeline_parallel)))

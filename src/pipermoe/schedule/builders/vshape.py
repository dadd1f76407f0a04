"""Schedules whose stages go down the ranks and up again in a V: rank i holds stages i and 2 p - 1 - i."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipermoe.schedule.action import Action, Kind, Schedule
from pipermoe.schedule.builders.dualpipe import v_stage_rank
from pipermoe.schedule.builders.squeeze import Limits, squeeze

F, I, W = Kind.FORWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD  # noqa: E741 - the papers' names


def zb_v(pipeline_parallel: int, microbatches: int, virtual_stages: int = 2) -> Schedule:
    """No bubble within a rank when F, I and W take equally long, with 1F1B's memory (arXiv 2401.10241, figure 8)."""
    p = pipeline_parallel

    def order(rank: int) -> Iterator[Action]:
        down, up = rank, 2 * p - 1 - rank
        full = max(microbatches, 2 * p - 1)  # what the pattern needs; micro-batches that do not exist are left out
        counters: dict[tuple[Kind, int], int] = {}

        def repeat(times: int, *steps: tuple[Kind, int]) -> Iterator[Action]:
            for key in steps * times:
                microbatch = counters.get(key, 0)
                counters[key] = microbatch + 1
                if microbatch < microbatches:
                    yield Action(*key, microbatch)

        yield from repeat(2 * (p - rank) - 1, (F, down))
        yield from repeat(rank, (F, up), (F, down))
        yield from repeat(p - rank, (F, up), (I, up), (W, up))
        yield from repeat(full - 2 * p + 1 + rank, (F, down), (I, down), (W, down), (F, up), (I, up), (W, up))
        yield from repeat(p - rank - 1, (I, down), (W, down), (F, up), (I, up), (W, up))
        yield from repeat(rank, (I, down), (I, up))
        yield from repeat(p - rank, (I, down), (W, down))
        yield from repeat(full - counters[W, up], (W, up))
        yield from repeat(full - counters[W, down], (W, down))

    return Schedule.of("zb-v", microbatches, v_stage_rank(p), map(order, range(p)))


def v_half(pipeline_parallel: int, microbatches: int, virtual_stages: int = 2) -> Schedule:
    """Half of 1F1B's memory (Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", arXiv 2405.15362)."""
    p = pipeline_parallel
    shift = 3 if p % 2 == 0 else 0  # keeps the passes of neighbouring micro-batches out of each other's slots

    def block(rank: int) -> tuple[int, int, int, int]:
        return 2 * rank, 3 * p - rank - 2, 3 * p + shift + 2 * rank - 1, 6 * p + shift - rank - 2

    return _repeated("v-half", p, microbatches, block, spare=0)


def v_min(pipeline_parallel: int, microbatches: int, virtual_stages: int = 2) -> Schedule:
    """A third of 1F1B's memory, the least that a V allows without idling in between (ibid.)."""
    p = pipeline_parallel
    shift = 2 if p % 3 == 0 else 0

    def block(rank: int) -> tuple[int, int, int, int]:
        return rank, 2 * p - rank - 1, 2 * p + shift + rank, 4 * p + shift - rank - 1

    # For p = 2 modulo 3 both gradients of a block end right before forwards: with less room the rhythm is lost and the
    # bubble grows with every micro-batch.
    return _repeated("v-min", p, microbatches, block, spare=2 if p % 3 == 2 else 0)


def _repeated(
    name: str, p: int, microbatches: int, block: Callable[[int], tuple[int, int, int, int]], spare: int
) -> Schedule:
    """A building block, repeated every six slots (two each of F, I, W), then squeezed without needing more memory.

    `block(rank)` gives the slots of F down, F up, I up and I down of micro-batch 0; `spare` is the number of
    activations that every rank may hold beyond what the bare pattern needs.
    """
    spines = []
    for rank in range(p):
        down, up = rank, 2 * p - 1 - rank
        passes = ((F, down), (F, up), (I, up), (I, down))
        timed = [
            (slot + 6 * m, Action(kind, stage, m))
            for (kind, stage), slot in zip(passes, block(rank), strict=True)
            for m in range(microbatches)
        ]
        spines.append([action for _, action in sorted(timed, key=lambda pair: pair[0])])
    schedule = Schedule.of(name, microbatches, v_stage_rank(p), spines)
    return squeeze(schedule, Limits.of_spines(schedule, spare))

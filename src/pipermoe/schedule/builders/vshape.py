"""Schedules whose stages go down the ranks and up again in a V: rank i holds stages i and 2 p - 1 - i."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pipermoe.schedule.action import Action, Kind, Schedule, overlap
from pipermoe.schedule.builders.dualpipe import v_stage_rank
from pipermoe.schedule.builders.squeeze import LONG_EXCHANGES, Limits, squeeze
from pipermoe.schedule.memory import in_flight
from pipermoe.schedule.timeline import simulate

F, I, W = Kind.FORWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD  # noqa: E741 - the papers' names
Slots = tuple[int, int, int, int]


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
    """Half of 1F1B's memory: p // 2 + 1 ranks' worth of activations (Qi et al. 2024, arXiv 2405.15362)."""
    p = pipeline_parallel
    shift = 3 if p % 2 == 0 else 0  # keeps the passes of neighbouring micro-batches out of each other's slots
    return _faster_of_bare_and_squeezed(_repeated("v-half", p, microbatches, _half_block(p, shift)))


def v_half_overlap(pipeline_parallel: int, microbatches: int, virtual_stages: int = 2) -> Schedule:
    """V-Half with the passes in neighbouring slots paired: half of all forwards run beside a backward.

    Laid out for all-to-alls of half the computation. A V cannot pair as many with less memory: a pair takes two slots,
    so every second hop takes two, which is V-Half's pace. An odd p costs one activation more than V-Half.
    """
    p = pipeline_parallel
    shift = 3 if p % 2 == 0 else 1
    pattern = _repeated("v-half-overlap", p, microbatches, _half_block(p, shift))
    spines = pattern.schedule(_paired)
    return squeeze(spines, Limits.equal(spines, 2 * ((p + 1) // 2 + 1)), LONG_EXCHANGES, patience=0.5)


def v_min(pipeline_parallel: int, microbatches: int, virtual_stages: int = 2) -> Schedule:
    """A third of 1F1B's memory, the least of a V without idling in between: (p + 1) // 3 + 1 activations (ibid.)."""
    p = pipeline_parallel
    shift = 2 if p % 3 == 0 else 0

    def block(rank: int) -> Slots:
        return rank, 2 * p - rank - 1, 2 * p + shift + rank, 4 * p + shift - rank - 1

    return _faster_of_bare_and_squeezed(_repeated("v-min", p, microbatches, block))


def _half_block(p: int, shift: int) -> Callable[[int], Slots]:
    return lambda rank: (2 * rank, 3 * p - rank - 2, 3 * p + shift + 2 * rank - 1, 6 * p + shift - rank - 2)


@dataclass(frozen=True, slots=True)
class _Pattern:
    """F and I of every rank, each with its slot, in order."""

    name: str
    microbatches: int
    ranks: tuple[tuple[tuple[int, Action], ...], ...]

    def schedule(self, order: Callable[[Iterable[tuple[int, Action]]], Iterator[Action]]) -> Schedule:
        return Schedule.of(self.name, self.microbatches, v_stage_rank(len(self.ranks)), map(order, self.ranks))


def _repeated(name: str, p: int, microbatches: int, block: Callable[[int], Slots]) -> _Pattern:
    """A building block, repeated every six slots: two each of F, I and W.

    `block(rank)` gives the slots of F down, F up, I up and I down of micro-batch 0.
    """

    def passes(rank: int) -> tuple[tuple[int, Action], ...]:
        down, up = rank, 2 * p - 1 - rank
        kinds = ((F, down), (F, up), (I, up), (I, down))
        timed = [
            (slot + 6 * m, Action(kind, stage, m))
            for (kind, stage), slot in zip(kinds, block(rank), strict=True)
            for m in range(microbatches)
        ]
        return tuple(sorted(timed, key=lambda each: each[0]))

    return _Pattern(name, microbatches, tuple(map(passes, range(p))))


def _faster_of_bare_and_squeezed(pattern: _Pattern) -> Schedule:
    """The pattern as it stands, or with its gaps closed in the same memory.

    Closing gaps early may cost room that a later forward needs (V-Min if 3 does not divide p), or save a third of the
    bubble.
    """
    bare = pattern.schedule(_with_weight_grads)
    squeezed = squeeze(pattern.schedule(_alone), Limits.equal(bare, max(in_flight(bare).rank)))
    return min(squeezed, bare, key=lambda schedule: simulate(schedule).step_seconds)


def _alone(passes: Iterable[tuple[int, Action]]) -> Iterator[Action]:
    return (action for _, action in passes)


def _with_weight_grads(passes: Iterable[tuple[int, Action]]) -> Iterator[Action]:
    """In every slot that the pattern leaves free the oldest weight gradient."""
    pending: deque[Action] = deque()
    free = 0
    for slot, action in passes:
        while pending and free < slot:
            yield pending.popleft()
            free += 1
        yield action
        free = slot + 1
        if action.kind is I:
            pending.append(action._replace(kind=W))
    yield from pending


def _paired(passes: Iterable[tuple[int, Action]]) -> Iterator[Action]:
    """A forward and a backward of different micro-batches in neighbouring slots as a pair."""
    waiting: deque[tuple[int, Action]] = deque()  # at most one
    for slot, action in passes:
        if waiting:
            before, other = waiting.popleft()
            opposite = (action.kind is F) is not (other.kind is F)
            if before == slot - 1 and opposite and action.microbatch != other.microbatch:
                yield overlap(action, other) if action.kind is F else overlap(other, action)
                continue
            yield other
        waiting.append((slot, action))
    yield from (action for _, action in waiting)

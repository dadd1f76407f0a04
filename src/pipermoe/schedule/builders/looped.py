"""Several model chunks per rank, laid out in a loop: stage s lives on rank s modulo the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipermoe.schedule.action import Action, Kind, Schedule

F, B = Kind.FORWARD, Kind.BACKWARD
Order = Callable[[int], Iterator[Action]]  # the actions of a rank


def _looped(name: str, pipeline_parallel: int, microbatches: int, virtual_stages: int, order: Order) -> Schedule:
    stage_rank = [stage % pipeline_parallel for stage in range(pipeline_parallel * virtual_stages)]
    return Schedule.of(name, microbatches, stage_rank, map(order, range(pipeline_parallel)))


def breadth_first(pipeline_parallel: int, microbatches: int, virtual_stages: int) -> Schedule:
    """All micro-batches through a chunk before the next chunk (Lamy-Poirier 2023, arXiv 2211.05953, figure 4d)."""

    def order(rank: int) -> Iterator[Action]:
        stages = range(rank, pipeline_parallel * virtual_stages, pipeline_parallel)
        for stage in stages:
            yield from (Action(F, stage, m) for m in range(microbatches))
        for stage in reversed(stages):
            yield from (Action(B, stage, m) for m in range(microbatches))

    return _looped("breadth-first", pipeline_parallel, microbatches, virtual_stages, order)


def interleaved_1f1b(pipeline_parallel: int, microbatches: int, virtual_stages: int) -> Schedule:
    """Depth first: a round of micro-batches through chunk after chunk (Narayanan et al. 2021, figure 4 bottom).

    The paper asks for a multiple of `pipeline_parallel` micro-batches. Here any number works: it is divided into
    rounds of at least `pipeline_parallel` as evenly as possible, the larger rounds first.
    """
    sequence = interleaved_sequence(pipeline_parallel, microbatches, virtual_stages)
    first_round = _rounds(pipeline_parallel, microbatches)[0]

    def order(rank: int) -> Iterator[Action]:
        forwards = [Action(F, chunk * pipeline_parallel + rank, m) for chunk, m in sequence]
        backwards = [Action(B, (virtual_stages - 1 - chunk) * pipeline_parallel + rank, m) for chunk, m in sequence]
        warm_up = (virtual_stages - 1) * first_round + 2 * (pipeline_parallel - 1 - rank)
        yield from alternate(forwards, backwards, warm_up)

    return _looped("interleaved-1f1b", pipeline_parallel, microbatches, virtual_stages, order)


def interleaved_sequence(pipeline_parallel: int, microbatches: int, virtual_stages: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) in the order in which every rank takes its forwards, and mirrored its backwards."""
    sequence, first = [], 0
    for size in _rounds(pipeline_parallel, microbatches):
        sequence += [(chunk, m) for chunk in range(virtual_stages) for m in range(first, first + size)]
        first += size
    return sequence


def _rounds(pipeline_parallel: int, microbatches: int) -> list[int]:
    """Sizes of the rounds of micro-batches that go through a chunk together."""
    count = max(1, microbatches // pipeline_parallel)
    return [microbatches // count + (i < microbatches % count) for i in range(count)]


def alternate(forwards: list[Action], backwards: list[Action], warm_up: int) -> Iterator[Action]:
    """`warm_up` forwards, then a forward and a backward in turn, then the remaining backwards."""
    warm_up = min(warm_up, len(forwards))
    yield from forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        yield forward
        yield backward
    yield from backwards[len(forwards) - warm_up :]

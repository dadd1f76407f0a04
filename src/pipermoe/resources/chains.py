"""Paths through a schedule as counts of work: a step lasts at least as long as any of them.

Actions of a path wait for each other, so no simulation ends before the sum of its parts. Two kinds are here. The first
micro-batch comes through the stages before a rank's first one (fill), the rank works through all micro-batches of its
stages, and the last gradient goes on to stage 0 (drain; Narayanan et al., arXiv 2104.04473, section 2.2, for equal
stages). And where a rank never holds more than K micro-batches of a stage, the gradient of one has to come back through
all stages behind before the K-th after it may set out. Nothing here depends on a size or a duration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.stages import StageShapes
from pipermoe.resources.unit_seconds import SENDS, Work, columns
from pipermoe.schedule.ramps import Chunks, Ramp, ramps
from pipermoe.schedule.traits import Traits, schedule_traits

Counts = NDArray[np.float64]  # over the prices of resources.unit_seconds, in the last axis


@dataclass(frozen=True, slots=True)
class Chains:
    """The longest paths by the class of ranks on which they end; ranks with equal layers are one class.

    A path counts `once` and, for every micro-batch, `each`: both (paths, prices), sorted by class, of which class c
    begins at `starts[c]`. `computed` (prices,) is the computing of one micro-batch on all stages. `holds` (classes,
    parts) is what the ranks of a class hold, `ranks` (classes,) how many there are.
    """

    once: Counts
    each: Counts
    starts: NDArray[np.int64]
    computed: Counts
    holds: NDArray[np.int64]
    ranks: NDArray[np.int64]

    @property
    def shapes(self) -> StageShapes:
        """What the classes hold, as shapes."""
        return StageShapes(*self.holds.T)


@lru_cache(maxsize=8192)
def chains(
    schedule: str,
    pipeline_parallel: int,
    virtual_stages: int,
    parts: tuple[tuple[int, ...], ...],
    hops: tuple[int, ...],
    levels: int,
    microbatches: int,
) -> Chains:
    """The chains of a pipeline whose stages hold `parts[stage]`, in the order of StageShapes.

    `hops` are the levels of the network, of so many, between each stage and the next: -1 on one rank. The chains hold
    for `microbatches` or more.
    """
    traits = schedule_traits(schedule, pipeline_parallel, virtual_stages)
    count = np.array(parts, dtype=np.int64)
    held = np.stack([count[list(stages)].sum(axis=0) for stages in traits.stages_of])
    holds, class_of, ranks = np.unique(held, axis=0, return_inverse=True, return_counts=True)
    found: list[list[tuple[Counts, Counts]]] = [[] for _ in holds]
    stages = _Stages.of(count, hops, levels, splits=traits.splits_backward)
    found_ramps = ramps(schedule, pipeline_parallel, virtual_stages, microbatches)
    for end, once, each in _paths(traits, stages, found_ramps):
        found[class_of.ravel()[end]].append((once, each))
    kept = [_longest(paths) for paths in found]
    return Chains(
        once=np.concatenate([once for once, _ in kept]),
        each=np.concatenate([each for _, each in kept]),
        starts=np.cumsum([0, *(len(once) for once, _ in kept)])[:-1],
        computed=(stages.computed_forward + stages.computed_backward + stages.postponed).sum(axis=0),
        holds=holds,
        ranks=ranks,
    )


@dataclass(frozen=True, slots=True)
class _Stages:
    """Counts (stages, prices) of a micro-batch on every stage: computing and exchanging, forward and backward.

    `postponed` are weight gradients that need not follow the backward at once; the others are part of it. `fill[s]` and
    `drain[s]` are what lies before stage s on the way there and behind it on the way back.
    """

    computed_forward: Counts
    exchanged_forward: Counts
    computed_backward: Counts
    exchanged_backward: Counts
    postponed: Counts
    fill: Counts
    drain: Counts

    @classmethod
    def of(cls, count: NDArray[np.int64], hops: tuple[int, ...], levels: int, *, splits: bool) -> _Stages:
        def work(kind: Work) -> Counts:
            counts = np.zeros((len(count), SENDS + levels))
            counts[:, columns(kind)] = count
            return counts

        forward, exchanged_forward = work(Work.FORWARD), work(Work.FORWARD_EXCHANGE)
        backward, exchanged_backward = work(Work.INPUT_GRAD), work(Work.BACKWARD_EXCHANGE)
        weight_grad = work(Work.WEIGHT_GRAD)
        backward, postponed = (backward, weight_grad) if splits else (backward + weight_grad, 0 * weight_grad)
        messages = np.zeros_like(forward)
        for stage, level in enumerate(hops[: len(count) - 1]):
            messages[stage, SENDS + level] = level >= 0
        return cls(
            computed_forward=forward,
            exchanged_forward=exchanged_forward,
            computed_backward=backward,
            exchanged_backward=exchanged_backward,
            postponed=postponed,
            fill=_before(forward + exchanged_forward + messages),
            drain=_before(backward + exchanged_backward + messages),
        )

    def sum(self, name: str, stages: tuple[int, ...], times: Chunks | None = None) -> Counts:
        """What the stages do together, each once or so many `times`."""
        each = getattr(self, name)[list(stages)]
        return each.sum(axis=0) if times is None else np.array(times) @ each

    def round_trip(self, stage: int) -> Counts:
        """A micro-batch from the start of its forward on a stage to the end of its backward there."""
        work = self.computed_forward + self.exchanged_forward + self.computed_backward + self.exchanged_backward
        ahead, back = self.fill[-1] - self.fill[stage], self.drain[-1] - self.drain[stage]
        return ahead + back + work[-1]


def _before(each: Counts) -> Counts:
    return np.cumsum(each, axis=0) - each


def _paths(traits: Traits, stages: _Stages, found: tuple[Ramp, ...]) -> Iterator[tuple[int, Counts, Counts]]:
    """(rank on which it ends, counts of a step, counts of every micro-batch) of paths through every rank."""
    first_home = next(rank for rank, held in enumerate(traits.stages_of) if 0 in held)
    share = 0.5 if traits.mirrored else 1.0  # of the micro-batches that a rank works through
    for rank, (held, ramp) in enumerate(zip(traits.stages_of, found, strict=True)):
        first = min(held)  # the first action of a rank is a forward of it, the last but weight gradients its backward
        there_and_back = stages.fill[first] + stages.drain[first] + stages.postponed[0]
        for once, each, later in _work(traits, stages, held, ramp):
            yield rank, stages.fill[first] + once, share * (each + later)
            if first:
                yield first_home, once + there_and_back, share * each
        if ramp.most:
            yield first_home, there_and_back, share / ramp.most * stages.round_trip(first)


def _work(
    traits: Traits, stages: _Stages, held: tuple[int, ...], ramp: Ramp
) -> Iterator[tuple[Counts, Counts, Counts]]:
    """(once, each, postponed) of what a rank does; `each` and `postponed` for every micro-batch.

    A pair takes at least: all its computing, all its exchanging, either part alone. In each sum the other work counts
    where it is in no pair. Of a schedule that postpones weight gradients some may be in pairs.
    """
    forward, exchanged_forward = stages.sum("computed_forward", held), stages.sum("exchanged_forward", held)
    backward, exchanged_backward = stages.sum("computed_backward", held), stages.sum("exchanged_backward", held)
    postponed, nothing = stages.sum("postponed", held), 0 * forward
    if not traits.overlaps:
        yield nothing, forward + exchanged_forward + backward + exchanged_backward, postponed
        return

    def alone(forwards: tuple[str, ...], backwards: tuple[str, ...]) -> tuple[Counts, Counts]:
        """Of these works what is in no pair: once, and of every micro-batch."""
        once = sum(stages.sum(name, held, ramp.alone_forward) for name in forwards)
        once += sum(stages.sum(name, held, ramp.alone_backward) for name in backwards)
        if not ramp.never_paired:
            return once + nothing, nothing
        return once + nothing, nothing + sum(stages.sum(name, held, ramp.never_paired) for name in forwards + backwards)

    sums = (
        (forward + backward, postponed, ("exchanged_forward",), ("exchanged_backward",)),
        (exchanged_forward + exchanged_backward, nothing, ("computed_forward",), ("computed_backward",)),
        (forward + exchanged_forward, nothing, (), ("computed_backward", "exchanged_backward")),
        (backward + exchanged_backward, postponed, ("computed_forward", "exchanged_forward"), ()),
    )
    for each, later, forwards, backwards in sums:
        once, always = alone(forwards, backwards)
        yield once, each + always, later


def _longest(paths: list[tuple[Counts, Counts]]) -> tuple[Counts, Counts]:
    """Those that no other one contains."""
    width = paths[0][0].size
    both = np.unique(np.array([np.concatenate(path) for path in paths]), axis=0)
    contained = np.all(both[:, None] <= both[None], axis=2) & ~np.eye(len(both), dtype=bool)
    kept = both[~np.any(contained, axis=1)]
    return kept[:, :width], kept[:, width:]

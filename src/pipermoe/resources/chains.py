"""Paths through a schedule as counts of work: a step lasts at least as long as any of them.

Actions of a path wait for each other, so no simulation ends before the sum of its parts. Here are the paths that every
schedule has, whatever its order: the first micro-batch comes through the stages before a rank's first one (fill), the
rank works through all micro-batches of its stages, and the last gradient goes on to stage 0 (drain; Narayanan et al.,
arXiv 2104.04473, section 2.2, for equal stages). Nothing here depends on a size or a duration.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.stages import StageShapes
from pipermoe.resources.unit_seconds import SENDS, Work, columns
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
) -> Chains:
    """The chains of a pipeline whose stages hold `parts[stage]`, in the order of StageShapes.

    `hops` are the levels of the network, of so many, between each stage and the next: -1 on one rank.
    """
    traits = schedule_traits(schedule, pipeline_parallel, virtual_stages)
    count = np.array(parts, dtype=np.int64)
    held = np.stack([count[list(stages)].sum(axis=0) for stages in traits.stages_of])
    holds, class_of, ranks = np.unique(held, axis=0, return_inverse=True, return_counts=True)
    found: list[list[tuple[Counts, Counts]]] = [[] for _ in holds]
    stages = _Stages.of(count, hops, levels, splits=traits.splits_backward)
    for end, once, each in _paths(traits, stages):
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

    def sum(self, name: str, stages: tuple[int, ...]) -> Counts:
        return getattr(self, name)[list(stages)].sum(axis=0)


def _before(each: Counts) -> Counts:
    return np.cumsum(each, axis=0) - each


def _paths(traits: Traits, stages: _Stages) -> Iterator[tuple[int, Counts, Counts]]:
    """(rank on which it ends, counts of a step, counts of every micro-batch) of paths through every rank."""
    first_home = next(rank for rank, held in enumerate(traits.stages_of) if 0 in held)
    share = 0.5 if traits.mirrored else 1.0  # of the micro-batches that a rank works through
    for rank, held in enumerate(traits.stages_of):
        first = min(held)  # the first action of a rank is a forward of it, the last but weight gradients its backward
        for once, each, later in _work(traits, stages, held):
            yield rank, stages.fill[first] + once, share * (each + later)
            if first:
                passed_on = stages.fill[first] + once + stages.drain[first] + stages.postponed[0]
                yield first_home, passed_on, share * each


def _work(traits: Traits, stages: _Stages, held: tuple[int, ...]) -> Iterator[tuple[Counts, Counts, Counts]]:
    """(once, each, postponed) of what a rank does; `each` and `postponed` for every micro-batch.

    A pair takes at least: all its computing, all its exchanging, either part alone. In each sum the other work counts
    where it is not in a pair: before its first backward a rank has done a forward of every stage that it holds, after
    its last forward it does a backward of each. Of a schedule that postpones weight gradients some may be in pairs.
    """
    forward, exchanged_forward = stages.sum("computed_forward", held), stages.sum("exchanged_forward", held)
    backward, exchanged_backward = stages.sum("computed_backward", held), stages.sum("exchanged_backward", held)
    postponed, nothing = stages.sum("postponed", held), 0 * forward
    if not traits.overlaps:
        yield nothing, forward + exchanged_forward + backward + exchanged_backward, postponed
        return
    alone = 0.0 if traits.mirrored else 1.0  # of two directions, the one may be in the middle when the other begins
    yield alone * (exchanged_forward + exchanged_backward), forward + backward, postponed
    yield alone * (forward + backward), exchanged_forward + exchanged_backward, nothing
    yield alone * (backward + exchanged_backward), forward + exchanged_forward, nothing
    yield alone * (forward + exchanged_forward), backward + exchanged_backward, postponed


def _longest(paths: list[tuple[Counts, Counts]]) -> tuple[Counts, Counts]:
    """Those that no other one contains."""
    width = paths[0][0].size
    both = np.unique(np.array([np.concatenate(path) for path in paths]), axis=0)
    contained = np.all(both[:, None] <= both[None], axis=2) & ~np.eye(len(both), dtype=bool)
    kept = both[~np.any(contained, axis=1)]
    return kept[:, :width], kept[:, width:]

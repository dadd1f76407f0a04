"""Paths through a schedule as counts of work: a step lasts at least as long as any of them.

Actions of a path wait for each other, so no simulation ends before the sum of its parts. Two kinds are here. The first
micro-batch comes through the stages before a rank's first one (fill), the rank works through all micro-batches of its
stages, and the last gradient goes on to stage 0 (drain; Narayanan et al., arXiv 2104.04473, section 2.2, for equal
stages). And where a rank never holds more than K micro-batches of a stage, the gradient of one has to come back through
all stages behind before the K-th after it may set out; the same where no more than K are on their way back between two
stages. Nothing here depends on a size or a duration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.stages import rank_classes
from pipermoe.resources.unit_seconds import SENDS, Work, columns
from pipermoe.schedule.builders import Homes
from pipermoe.schedule.ramps import Chunks, Ramp, ramps
from pipermoe.schedule.traits import Traits, schedule_traits, ways

Counts = NDArray[np.float64]  # over the prices of resources.unit_seconds, of messages one, in the last axis


@dataclass(frozen=True, slots=True)
class Chains:
    """The longest paths by the class of ranks on which they end; ranks with equal layers are one class.

    A path counts `once` and, for every micro-batch, `each`, both (paths, prices), and all that `over` (paths, 1). Paths
    are sorted by class, of which class c begins at `starts[c]`. Counts are whole numbers or halves: their sums are
    exact. `computed` (prices,) is the computing of one micro-batch on all stages. `holds` (classes, parts) is what the
    ranks of a class hold, `ranks` (classes,) how many there are.
    """

    once: Counts
    each: Counts
    over: NDArray[np.int64]
    starts: NDArray[np.int64]
    computed: Counts
    holds: NDArray[np.int64]
    ranks: NDArray[np.int64]


@lru_cache(maxsize=8192)
def chains(
    schedule: str,
    pipeline_parallel: int,
    virtual_stages: int,
    parts: tuple[tuple[int, ...], ...],
    microbatches: int,
) -> Chains:
    """The chains of a pipeline whose stages hold `parts[stage]`, in the order of StageShapes.

    They hold for `microbatches` or more. All messages count alike, whichever level of the network they cross.
    """
    traits = schedule_traits(schedule, pipeline_parallel, virtual_stages)
    count = np.array(parts, dtype=np.int64)
    ranks = _ranks(schedule, pipeline_parallel, virtual_stages, microbatches)
    holds, class_of, alike = rank_classes(traits.stages_of, parts)
    stages = _Stages.of(count, _crossing(traits.stages_of), splits=traits.splits_backward)
    ends, once, each, over = (np.concatenate(found) for found in zip(*_paths(traits, stages, ranks), strict=True))
    owner, paths = class_of[ends], _longest(class_of[ends], once, each, over)
    return Chains(
        once=once[paths],
        each=each[paths],
        over=over[paths, None],
        starts=np.searchsorted(owner[paths], np.arange(len(holds))),
        computed=(stages.computed_forward + stages.computed_backward + stages.postponed).sum(axis=0),
        holds=holds,
        ranks=alike,
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
    def of(cls, count: NDArray[np.int64], crossing: NDArray[np.bool_], *, splits: bool) -> _Stages:
        def work(kind: Work) -> Counts:
            counts = np.zeros((len(count), SENDS + 1))
            counts[:, columns(kind)] = count
            return counts

        forward, exchanged_forward = work(Work.FORWARD), work(Work.FORWARD_EXCHANGE)
        backward, exchanged_backward = work(Work.INPUT_GRAD), work(Work.BACKWARD_EXCHANGE)
        weight_grad = work(Work.WEIGHT_GRAD)
        backward, postponed = (backward, weight_grad) if splits else (backward + weight_grad, 0 * weight_grad)
        messages = np.zeros_like(forward)
        messages[:-1, SENDS] = crossing
        return cls(
            computed_forward=forward,
            exchanged_forward=exchanged_forward,
            computed_backward=backward,
            exchanged_backward=exchanged_backward,
            postponed=postponed,
            fill=_before(forward + exchanged_forward + messages),
            drain=_before(backward + exchanged_backward + messages),
        )

    @property
    def round_trip(self) -> Counts:
        """(stages, prices): a micro-batch from the start of its forward to the end of its backward."""
        work = self.computed_forward + self.exchanged_forward + self.computed_backward + self.exchanged_backward
        return self.fill[-1] - self.fill + self.drain[-1] - self.drain + work[-1]

    def way_back(self, last: NDArray[np.int64], first: NDArray[np.int64]) -> Counts:
        """(ways, prices): a micro-batch from the start of the backward of one stage to the end of that of another."""
        return self.drain[last] - self.drain[first] + (self.computed_backward + self.exchanged_backward)[last]


@dataclass(frozen=True, slots=True)
class _Ranks:
    """Of every rank and stage, (ranks, stages): whether it is `held`, how many passes are alone, as `Ramp` says.

    `first` and `final` (ranks,) are the lowest and the highest stage of a rank, `most` what it holds of the lowest at
    any time, `returning` how many are on their way back between them, but for the `last`.
    """

    held: NDArray[np.int64]
    first: NDArray[np.int64]
    final: NDArray[np.int64]
    most: NDArray[np.int64]
    returning: NDArray[np.int64]
    last: NDArray[np.int64]
    alone_forward: NDArray[np.int64]
    alone_backward: NDArray[np.int64]
    never_paired: NDArray[np.int64]

    @classmethod
    def of(cls, stages_of: Homes, found: Sequence[Ramp]) -> _Ranks:
        def spread(counts: Iterable[Chunks]) -> NDArray[np.int64]:
            matrix = np.zeros((len(stages_of), 1 + max(map(max, stages_of))), dtype=np.int64)
            for row, held, each in zip(matrix, stages_of, counts, strict=True):
                row[list(held)] = each or 0
            return matrix

        return cls(
            held=spread((1,) * len(held) for held in stages_of),
            first=np.array([min(held) for held in stages_of]),
            final=np.array([max(held) for held in stages_of]),
            most=np.array([ramp.most for ramp in found]),
            returning=np.array([ramp.returning for ramp in found]),
            last=np.array([ramp.last for ramp in found]),
            alone_forward=spread(ramp.alone_forward for ramp in found),
            alone_backward=spread(ramp.alone_backward for ramp in found),
            never_paired=spread(ramp.never_paired for ramp in found),
        )


def _crossing(stages_of: Homes) -> NDArray[np.bool_]:
    """Whether what each stage hands to the next goes to another rank: (stages - 1,)."""
    return np.any([np.diff(way) != 0 for way in ways(stages_of)], axis=0)


@lru_cache(maxsize=8192)
def _ranks(schedule: str, pipeline_parallel: int, virtual_stages: int, microbatches: int) -> _Ranks:
    homes = schedule_traits(schedule, pipeline_parallel, virtual_stages).stages_of
    return _Ranks.of(homes, ramps(schedule, pipeline_parallel, virtual_stages, microbatches))


def _before(each: Counts) -> Counts:
    return np.cumsum(each, axis=0) - each


def _paths(traits: Traits, stages: _Stages, ranks: _Ranks) -> Iterator[tuple[NDArray, Counts, Counts, NDArray]]:
    """(ranks on which they end, counts of a step and of every micro-batch, divisors) of paths through every rank."""
    first = ranks.first
    share = 0.5 if traits.mirrored else 1.0  # of the micro-batches that a rank works through
    here, first_home, undivided = np.arange(len(first)), np.full(len(first), first.argmin()), np.ones_like(first)
    # The first action of a rank is a forward of its first stage, the last but weight gradients a backward of that.
    there_and_back = stages.fill[first] + stages.drain[first] + stages.postponed[0]
    for once, each, later in _work(traits, stages, ranks):
        yield here, stages.fill[first] + once, share * (each + later), undivided
        yield first_home, there_and_back + once, share * each, undivided
    known = ranks.most > 0
    most = ranks.most[known]
    trips = share * stages.round_trip[first[known]]
    yield first_home[known], most[:, None] * there_and_back[known], trips, most
    known = ranks.returning > 0
    way = stages.way_back(ranks.final[known], first[known])
    returning, last = ranks.returning[known, None], ranks.last[known, None]
    # One after the other, beside the first or the last micro-batch's other stages.
    alone = returning * (stages.round_trip[0] + stages.postponed[0]) - np.where(last > 0, last, returning) * way
    yield first_home[known], alone, way, ranks.returning[known]


def _work(traits: Traits, stages: _Stages, ranks: _Ranks) -> Iterator[tuple[Counts, Counts, Counts]]:
    """(once, each, postponed) of what the ranks do; `each` and `postponed` for every micro-batch.

    A pair takes at least: all its computing, all its exchanging, either part alone. In each sum the other work counts
    where it is in no pair. Of a schedule that postpones weight gradients some may be in pairs.
    """
    forward, exchanged_forward = stages.computed_forward, stages.exchanged_forward
    backward, exchanged_backward = stages.computed_backward, stages.exchanged_backward
    postponed, nothing = stages.postponed, 0 * forward
    if not traits.overlaps:
        each = forward + exchanged_forward + backward + exchanged_backward
        yield ranks.held @ nothing, ranks.held @ each, ranks.held @ postponed
        return
    sums = (
        (forward + backward, postponed, exchanged_forward, exchanged_backward),
        (exchanged_forward + exchanged_backward, nothing, forward, backward),
        (forward + exchanged_forward, nothing, nothing, backward + exchanged_backward),
        (backward + exchanged_backward, postponed, forward + exchanged_forward, nothing),
    )
    for each, later, other_forward, other_backward in sums:
        once = ranks.alone_forward @ other_forward + ranks.alone_backward @ other_backward
        always = ranks.never_paired @ (other_forward + other_backward)
        yield once, ranks.held @ each + always, ranks.held @ later


def _longest(owner: NDArray[np.int64], once: Counts, each: Counts, over: NDArray[np.int64]) -> NDArray[np.int64]:
    """The paths, sorted by owner, without those contained in the longest of the same owner, `each` and `over`."""
    kind: dict[bytes, int] = {}
    of = np.array([kind.setdefault(bytes(path), len(kind)) for path in np.column_stack([owner, over, each])])
    longest = np.empty(len(kind), dtype=np.int64)
    order = np.argsort(once.sum(axis=1), kind="stable")
    longest[of[order]] = order  # of equal ones the last stays
    reaches_out = (once > once[longest[of]]).any(axis=1)
    rows = np.union1d(np.flatnonzero(reaches_out), longest)
    return rows[np.argsort(owner[rows], kind="stable")]

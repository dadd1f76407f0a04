"""Paths through a schedule as counts of work: a step lasts at least as long as any of them.

Actions of a path wait for each other, so no simulation ends before the sum of its parts. Two kinds are here. The first
micro-batch comes through the stages before a rank's first one (fill), the rank works through all micro-batches of its
stages, and the last gradient goes on to stage 0 (drain; Narayanan et al., arXiv 2104.04473, section 2.2, for equal
stages). And where a rank never holds more than K micro-batches of a stage, the gradient of one has to come back through
all stages behind before the K-th after it may set out; the same where no more than K are on their way back between two
stages. Nothing here depends on a size or a duration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.stages import rank_classes
from pipermoe.resources.unit_seconds import SENDS, Work, columns
from pipermoe.schedule.builders import Homes
from pipermoe.schedule.ramps import Ramp, ramps
from pipermoe.schedule.traits import Traits, schedule_traits, ways

Counts = NDArray[np.float64]  # over the prices of resources.unit_seconds, of messages one, in the last axis
Paths = tuple[NDArray[np.int64], Counts, Counts, NDArray[np.int64]]  # the class on which each ends, once, each, over


@dataclass(frozen=True, slots=True)
class Chains:
    """The longest paths by the class of ranks on which they end; ranks with equal layers are one class.

    A path counts `once` and, for every micro-batch, `each`, both (paths, prices), and the `limited` paths all that
    `over` (limited paths, 1). The first is no path: the computing on all stages. The others are sorted by class; of all
    these groups one begins at each of `starts`. Counts are whole numbers or halves: their sums are exact. `holds`
    (classes, parts) is what the ranks of a class hold, `ranks` (classes,) how many there are.
    """

    once: Counts
    each: Counts
    limited: slice
    over: NDArray[np.int64]
    starts: list[int]
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
    pipe = _pipe(schedule, pipeline_parallel, virtual_stages, parts)
    found = ramps(schedule, pipeline_parallel, virtual_stages, microbatches)
    holds, _, alike = rank_classes(pipe.stages_of, parts)
    owner, once, each, over = map(
        np.concatenate, zip(pipe.through_all(found), *pipe.there_and_back(found), strict=True)
    )
    order = np.lexsort((over, owner))
    limited = 1 + np.flatnonzero(over[order] > 1)  # all end on the rank of stage 0
    computed = pipe.stages.computed[None]
    return Chains(
        once=np.concatenate([0 * computed, once[order]]),
        each=np.concatenate([computed, each[order]]),
        limited=slice(limited[0], limited[-1] + 1) if len(limited) else slice(0),
        over=over[order[limited - 1], None],
        starts=[0, *(1 + np.searchsorted(owner[order], np.arange(len(holds)))).tolist()],
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
    def computed(self) -> Counts:
        """(prices,): all stages."""
        return (self.computed_forward + self.computed_backward + self.postponed).sum(axis=0)

    @property
    def round_trip(self) -> Counts:
        """(stages, prices): a micro-batch from the start of its forward to the end of its backward."""
        work = self.computed_forward + self.exchanged_forward + self.computed_backward + self.exchanged_backward
        return self.fill[-1] - self.fill + self.drain[-1] - self.drain + work[-1]

    def way_back(self, last: NDArray[np.int64], first: NDArray[np.int64]) -> Counts:
        """(ways, prices): a micro-batch from the start of the backward of one stage to the end of that of another."""
        return self.drain[last] - self.drain[first] + (self.computed_backward + self.exchanged_backward)[last]


def _before(each: Counts) -> Counts:
    return np.cumsum(each, axis=0) - each


def _crossing(stages_of: Homes) -> NDArray[np.bool_]:
    """Whether what each stage hands to the next goes to another rank: (stages - 1,)."""
    return np.any([np.diff(way) != 0 for way in ways(stages_of)], axis=0)


@dataclass(frozen=True, slots=True)
class _Sum:
    """What a rank's passes take at least, one after the other: (ranks, prices) of every micro-batch, `later` weight
    gradients that need not follow at once. Passes that are alone add something: (ranks, chunks, prices).
    """

    each: Counts
    later: Counts
    alone_forward: Counts
    alone_backward: Counts


@dataclass(frozen=True, slots=True)
class _Pipe:
    """What the paths of a pipeline have in common, however many micro-batches there are.

    A rank works through `share` of them. `first` and `final` (ranks,) are the lowest and the highest stage of a rank.
    Its own class and that of the rank of stage 0 are `here` and `home` (ranks,), where paths end. What lies around its
    first action, a forward of its first stage, and its last but weight gradients, a backward of that, is `around`
    (ranks, prices). Paths through all of its work are of so many kinds by owner and `each`: `kind` (paths,).
    """

    stages_of: Homes
    stages: _Stages
    share: float
    first: NDArray[np.int64]
    final: NDArray[np.int64]
    here: NDArray[np.int64]
    home: NDArray[np.int64]
    around: Counts
    sums: tuple[_Sum, ...]
    owner: NDArray[np.int64]
    each: Counts
    kind: NDArray[np.int64]

    def through_all(self, found: Sequence[Ramp]) -> Paths:
        """A rank works through all micro-batches, and is done or the last gradient goes on. Without paths contained in
        the longest of their kind.
        """
        forward = np.array([ramp.alone_forward for ramp in found])
        backward = np.array([ramp.alone_backward for ramp in found])
        alone = [0 * self.around]
        if forward.size:
            alone = [
                np.einsum("rc,rcp->rp", forward, each.alone_forward)
                + np.einsum("rc,rcp->rp", backward, each.alone_backward)
                for each in self.sums
            ]
        fill = self.stages.fill[self.first]
        once = np.concatenate([*(fill + each for each in alone), *(self.around + each for each in alone)])
        order = np.argsort(once.sum(axis=1), kind="stable")
        longest = np.empty(1 + self.kind.max(), dtype=np.int64)
        longest[self.kind[order]] = order  # of equal ones the last stays
        keeps = np.any(once > once[longest[self.kind]], axis=1) | np.isin(np.arange(len(once)), longest)
        return self.owner[keeps], once[keeps], self.each[keeps], np.ones(np.count_nonzero(keeps), dtype=np.int64)

    def there_and_back(self, found: Sequence[Ramp]) -> Iterator[Paths]:
        """Few micro-batches of a rank's lowest stage, or of those on their way back between its two, at once."""
        most, returning, last = np.array([(ramp.most, ramp.returning, ramp.last) for ramp in found]).T
        stages, known = self.stages, most > 0
        over, trips = most[known], self.share * stages.round_trip[self.first[known]]
        yield self.home[known], over[:, None] * self.around[known], trips, over
        known = returning > 0
        over, way = returning[known], stages.way_back(self.final[known], self.first[known])
        # One after the other, beside the first or the last micro-batch's other stages.
        beside = np.where(last[known] > 0, last[known], over)[:, None]
        alone = over[:, None] * (stages.round_trip[0] + stages.postponed[0]) - beside * way
        yield self.home[known], alone, way, over


@lru_cache(maxsize=8192)
def _pipe(schedule: str, pipeline_parallel: int, virtual_stages: int, parts: tuple[tuple[int, ...], ...]) -> _Pipe:
    traits = schedule_traits(schedule, pipeline_parallel, virtual_stages)
    stages_of = np.array(traits.stages_of)
    stages = _Stages.of(np.array(parts), _crossing(traits.stages_of), splits=traits.splits_backward)
    never_paired = [ramp.never_paired for ramp in ramps(schedule, pipeline_parallel, virtual_stages, pipeline_parallel)]
    sums = tuple(_sums(traits, stages, np.array(never_paired)))
    share = 0.5 if traits.mirrored else 1.0
    first, (_, here, _) = stages_of.min(axis=1), rank_classes(traits.stages_of, parts)
    home = np.full(len(here), here[first.argmin()])
    owner = np.concatenate([*(here for _ in sums), *(home for _ in sums)])
    each = share * np.concatenate([*(one.each + one.later for one in sums), *(one.each for one in sums)])
    kinds: dict[bytes, int] = {}
    return _Pipe(
        stages_of=traits.stages_of,
        stages=stages,
        share=share,
        first=first,
        final=stages_of.max(axis=1),
        here=here,
        home=home,
        around=stages.fill[first] + stages.drain[first] + stages.postponed[0],
        sums=sums,
        owner=owner,
        each=each,
        kind=np.array([kinds.setdefault(bytes(path), len(kinds)) for path in np.column_stack([owner, each])]),
    )


def _sums(traits: Traits, stages: _Stages, never_paired: NDArray[np.int64]) -> Iterator[_Sum]:
    """A pair takes at least: all its computing, all its exchanging, either part alone. In each sum the other work
    counts where it is in no pair, as `never_paired` (ranks, chunks) says. Of a schedule that postpones weight gradients
    some may be in pairs.
    """
    forward, exchanged_forward = stages.computed_forward, stages.exchanged_forward
    backward, exchanged_backward = stages.computed_backward, stages.exchanged_backward
    postponed, nothing = stages.postponed, 0 * forward
    of = np.array(traits.stages_of)
    if not traits.overlaps:
        each = forward + exchanged_forward + backward + exchanged_backward
        yield _Sum(each[of].sum(axis=1), postponed[of].sum(axis=1), nothing[of], nothing[of])
        return
    for each, later, other_forward, other_backward in (
        (forward + backward, postponed, exchanged_forward, exchanged_backward),
        (exchanged_forward + exchanged_backward, nothing, forward, backward),
        (forward + exchanged_forward, nothing, nothing, backward + exchanged_backward),
        (backward + exchanged_backward, postponed, forward + exchanged_forward, nothing),
    ):
        total = each[of].sum(axis=1)
        if never_paired.size:
            total = total + np.einsum("rc,rcp->rp", never_paired, (other_forward + other_backward)[of])
        yield _Sum(total, later[of].sum(axis=1), other_forward[of], other_backward[of])

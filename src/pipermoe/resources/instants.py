"""The instants at which a pipeline rank can hold most, as whole numbers that sizes in bytes are multiplied by.

`schedule.occupancy` says how many micro-batches each chunk of a rank holds while each action runs; here chunks become
parts, and the action its steps, in the order of the runtime (`resources.turns`). Ranks with equal parts are one class:
of their instants only those stay that no other exceeds in every number. Nothing here depends on a size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.turns import Leg, Part, Step, in_turn, parts_of_stages, steps, turns
from pipermoe.resources.whole_units import NOTHING_SHARDED, Sharded, UnitKind, WholeUnits
from pipermoe.schedule.action import Kind
from pipermoe.schedule.context import NO_CONTEXT
from pipermoe.schedule.occupancy import Work, growth, unexceeded


class Feature(IntEnum):
    """What is counted, by part where it has one: what stays between actions, messages, what stands between the steps of
    an action, and the work in progress, which is one of the last.

    KEPT from forward to backward; DEFERRED from I to W; a MESSAGE is the hidden state of a micro-batch, as is a STREAM
    on its way through a stage, or its gradient.
    """

    KEPT_MOE = 0
    KEPT_DENSE = 1
    KEPT_HEAD = 2
    KEPT_EMBEDDING = 3
    KEPT_JOIN = 4
    DEFERRED_MOE = 5
    DEFERRED_DENSE = 6
    DEFERRED_HEAD = 7
    DEFERRED_EMBEDDING = 8
    DEFERRED_JOIN = 9
    OUTPUT = 10
    GRADIENT = 11
    INCOMING = 12
    RECEIVED = 13  # kept inputs that came from another rank: where they were born, not their bytes
    STREAM = 14
    # A layer with experts after these steps of it, in a pair.
    AFTER_ATTEND = 15
    AFTER_ROUTE = 16
    AFTER_COMPUTE = 17
    AFTER_SPLIT = 18
    AFTER_COMPUTE_BACK = 19
    DEFERRED_COMPUTE_BACK = 20
    DEFERRED_ATTEND_BACK = 21
    # Work in progress, what it holds itself included: a whole part, forward, B or I, or one step of a pair.
    FORWARD_MOE = 22
    FORWARD_DENSE = 23
    FORWARD_HEAD = 24
    FORWARD_EMBEDDING = 25
    FORWARD_JOIN = 26
    FULL_MOE = 27
    FULL_DENSE = 28
    FULL_HEAD = 29
    FULL_EMBEDDING = 30
    FULL_JOIN = 31
    DEFERRING_MOE = 32
    DEFERRING_DENSE = 33
    DEFERRING_HEAD = 34
    DEFERRING_EMBEDDING = 35
    DEFERRING_JOIN = 36
    ATTEND = 37
    ROUTE = 38
    COMPUTE = 39
    MERGE = 40
    SPLIT = 41
    COMPUTE_BACK = 42
    ATTEND_BACK = 43
    # The weight gradients of a part, beside what they hold deferred.
    WEIGHTS_MOE = 44
    WEIGHTS_DENSE = 45
    WEIGHTS_HEAD = 46
    WEIGHTS_EMBEDDING = 47
    WEIGHTS_JOIN = 48


def by_part(first: Feature) -> tuple[Feature, ...]:
    """The features of every part, of which that of MOE is given."""
    return tuple(Feature(first + part) for part in Part)


KEPT, DEFERRED = by_part(Feature.KEPT_MOE), by_part(Feature.DEFERRED_MOE)
FORWARD, FULL, DEFERRING = (by_part(first) for first in (Feature.FORWARD_MOE, Feature.FULL_MOE, Feature.DEFERRING_MOE))
WEIGHTS = by_part(Feature.WEIGHTS_MOE)
LEGS = tuple(Feature(Feature.ATTEND + leg) for leg in Leg)
_WORK = slice(Feature.FORWARD_MOE, Feature.WEIGHTS_JOIN + 1)
_SUMMED = (Feature.OUTPUT, Feature.GRADIENT, Feature.INCOMING, Feature.STREAM, *KEPT[:2])
# A layer with experts before and after each of its steps in a pair, beside the stream.
_STANDS = {
    Leg.ATTEND: ((), (Feature.AFTER_ATTEND,)),
    Leg.ROUTE: ((Feature.AFTER_ATTEND,), (Feature.AFTER_ROUTE,)),
    Leg.COMPUTE: ((Feature.AFTER_ROUTE,), (Feature.AFTER_COMPUTE,)),
    Leg.MERGE: ((Feature.AFTER_COMPUTE,), (Feature.KEPT_MOE,)),
    Leg.SPLIT: ((Feature.KEPT_MOE,), (Feature.AFTER_SPLIT,)),
    Leg.COMPUTE_BACK: ((Feature.AFTER_SPLIT,), (Feature.AFTER_COMPUTE_BACK, Feature.DEFERRED_COMPUTE_BACK)),
    Leg.ATTEND_BACK: ((Feature.AFTER_COMPUTE_BACK,), (Feature.DEFERRED_ATTEND_BACK,)),
}
_WITH_STREAM = {Leg.ATTEND: (1, 0), Leg.MERGE: (0, 1), Leg.SPLIT: (1, 0), Leg.ATTEND_BACK: (0, 1)}


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One way to cut a model and to work through it; `layers[i]` says whether layer i has experts.

    `predictions` layers of multi-token prediction are behind the last head. `sharded` are whole only while in use.
    """

    schedule: str
    pipeline_parallel: int
    virtual_stages: int
    microbatches: int
    layers: tuple[bool, ...]
    layer_split: tuple[int, ...] = ()
    predictions: int = 0
    sharded: Sharded = NOTHING_SHARDED

    @property
    def parts(self) -> list[tuple[Part, ...]]:
        """The parts of every stage."""
        stages = self.pipeline_parallel * self.virtual_stages
        return parts_of_stages(self.layers, stages, self.layer_split, self.predictions)


@dataclass(frozen=True, slots=True)
class Instants:
    """`features[i]` of instant i, with `whole[i]` gathered weights and open gradients of every kind of unit.

    Instants are sorted into groups of one class of ranks and the same whole units: group g begins at `starts[g]` and
    belongs to class `owner[g]`. `holds[c]` are the parts of class c in the order of StageShapes, `class_of[rank]` its
    ranks.
    """

    features: NDArray[np.float64]  # (instants, len(Feature))
    whole: NDArray[np.float64]  # (groups, 2 * len(UnitKind))
    owner: NDArray[np.int64]  # (groups,)
    starts: NDArray[np.int64]  # (groups,)
    holds: NDArray[np.int64]  # (classes, parts)
    class_of: tuple[int, ...]


@lru_cache(maxsize=8192)
def instants(pipeline: Pipeline, *, by_rank: bool = False) -> Instants:
    """The instants of every class of ranks; `by_rank` keeps every rank a class of its own."""
    parts, sharded = pipeline.parts, pipeline.sharded
    arguments = pipeline.schedule, pipeline.pipeline_parallel, pipeline.virtual_stages, pipeline.microbatches
    found = growth(*arguments, in_context=sharded != NOTHING_SHARDED)
    counts, chunks = found.at(pipeline.microbatches), found.stages_of
    holds = [_holds(parts, chunks[rank], pipeline.predictions) for rank in range(pipeline.pipeline_parallel)]
    kinds = holds if by_rank else sorted(set(holds))
    class_of = tuple(range(len(holds))) if by_rank else tuple(map(kinds.index, holds))
    rows: list[list[NDArray]] = [[] for _ in kinds]
    whole, known = WholeUnits(parts, sharded), dict[tuple, NDArray[np.int64]]()
    held = _held(parts, chunks, np.array([work.rank for work in found.work]), counts)
    for work, state in zip(found.work, held, strict=True):
        alike = _what_counts(parts, work)
        if alike not in known:
            known[alike] = _steps_of(work, parts, whole)
        rows[class_of[work.rank]].append(known[alike] + state)
    best = [_largest(np.concatenate(each)) for each in rows]
    owner = np.repeat(np.arange(len(kinds)), [len(each) for each in best])
    every = np.concatenate(best)
    groups, of = np.unique(np.column_stack([owner, every[:, len(Feature) :]]), axis=0, return_inverse=True)
    order = np.argsort(of, kind="stable")
    return Instants(
        features=every[order, : len(Feature)].astype(np.float64),
        whole=groups[:, 1:].astype(np.float64),
        owner=groups[:, 0],
        starts=np.searchsorted(of[order], np.arange(len(groups))),
        holds=np.array(kinds, dtype=np.int64),
        class_of=class_of,
    )


@lru_cache
def pair_instants(layers: int) -> NDArray[np.int64]:
    """The features (instants, len(Feature)) of a pair through as many layers with experts, in the middle of a pipeline,
    beside what both micro-batches keep; their layers that are not kept yet, or no more, count negative.
    """
    parts = [(Part.MOE,) * layers] * 3
    found = _steps_of(Work(0, Kind.BACKWARD, stage=1, beside=1), parts, WholeUnits(parts, NOTHING_SHARDED))
    found[:, [Feature.OUTPUT, Feature.INCOMING]] += 1
    return _largest(found)[:, : len(Feature)]


def _what_counts(parts: Sequence[tuple[Part, ...]], work: Work) -> tuple:
    """Actions that are alike in this count alike beside what their rank holds."""
    if work.context != NO_CONTEXT:
        return work[1:]
    last = len(parts) - 1
    stages = [(parts[stage], stage == 0, stage == last) for stage in (work.stage, work.beside) if stage >= 0]
    return work.kind, *stages


def _steps_of(work: Work, parts: Sequence[Sequence[Part]], whole: WholeUnits) -> NDArray[np.int64]:
    """What is there at the steps of an action beside what its rank holds, those that can be most: (steps, counts)."""
    walk = _Walk(parts, whole.before(work.context))
    walk.through(work)
    return _largest(np.array(walk.found))


class _Walk:
    """One action, counting what is there beside what the rank holds while it runs, as the schedule sees it.

    `whole` follows the units that are whole meanwhile; what is found has their counts behind its features.
    """

    def __init__(self, parts: Sequence[Sequence[Part]], whole: WholeUnits):
        self.parts, self.whole = parts, whole
        self.state = np.zeros(len(Feature), dtype=np.int64)
        self.found: list[NDArray[np.int64]] = []

    def through(self, work: Work) -> None:
        """All of it."""
        if work.kind is Kind.WEIGHT_GRAD:
            self._weights(work.stage)
        elif work.beside >= 0:
            self._pair(work.beside, work.stage)
        else:
            self._alone(work.stage, work.kind)

    def _alone(self, stage: int, kind: Kind) -> None:
        """A forward, B or I; of parts in a row that are alike the first two and the last."""
        forward = kind is Kind.FORWARD
        self._begin(stage, forward=forward)
        order = steps(self.parts[stage], forward=forward)
        for i, step in enumerate(order):
            inner = 1 < i < len(order) - 1 and len({each.part for each in order[i - 2 : i + 2]}) == 1
            self.whole.use(stage, step)
            if kind is Kind.BACKWARD:
                self.whole.fill(stage, step)
            self._take(step, defers=kind is Kind.INPUT_GRAD, noted=not inner)
            if kind is Kind.BACKWARD:
                self.whole.reduce(stage, step)

    def _pair(self, ahead: int, behind: int) -> None:
        """A forward of stage `ahead` and a backward of stage `behind`, whose weight gradients run in between."""
        self._begin(ahead, forward=True)
        self._begin(behind, forward=False)
        owed: list[Feature] = []
        for step in in_turn(turns(self.parts[ahead], forward=True), turns(self.parts[behind], forward=False)):
            if step is None:
                self._add(owed, -1)
                owed = []
                self.whole.add_owed()
            else:
                self.whole.use(ahead if step.forward else behind, step)
                owed += self._take(step, defers=True, noted=True)

    def _weights(self, stage: int) -> None:
        """The weight gradients of a stage, in the order of its backward; each lets go of what it has read."""
        for step in steps(self.parts[stage], forward=False):
            self.whole.fill(stage, step)
            self._note(WEIGHTS[step.part])
            self.state[DEFERRED[step.part]] -= 1
            self.whole.reduce(stage, step)

    def _begin(self, stage: int, *, forward: bool) -> None:
        """Before the first step: a message becomes the stream; a forward has kept and made nothing yet."""
        first, last = stage == 0, stage == len(self.parts) - 1
        if forward:
            self._add([KEPT[part] for part in self.parts[stage]], -1)
            self.state[Feature.OUTPUT] -= not last
            self.state[Feature.STREAM] += not first
        else:
            self.state[Feature.INCOMING] -= not last
            self.state[Feature.STREAM] += not last

    def _note(self, work: Feature) -> None:
        row = np.concatenate([self.state, self.whole.counts])
        row[work] += 1
        self.found.append(row)

    def _take(self, step: Step, *, defers: bool, noted: bool) -> tuple[Feature, ...]:
        """One step; what its weight gradients hold from now on."""
        if step.leg is None:
            before, after, deferred = _ends_of(step, self.state[Feature.STREAM])
            deferred = deferred if defers else ()
            work = (FORWARD if step.forward else DEFERRING if defers else FULL)[step.part]
        else:
            stands, then = _STANDS[step.leg]
            takes, leaves = _WITH_STREAM.get(step.leg, (0, 0))
            deferred = tuple(each for each in then if each in _WAITING)
            before = stands + (Feature.STREAM,) * takes
            after = tuple(each for each in then if each not in _WAITING) + (Feature.STREAM,) * leaves
            work = LEGS[step.leg]
        self._add(before, -1)
        if noted:
            self._note(work)
        self._add((*after, *deferred), 1)
        return deferred

    def _add(self, features: Iterable[Feature], times: int) -> None:
        for feature in features:
            self.state[feature] += times


_WAITING = (Feature.DEFERRED_COMPUTE_BACK, Feature.DEFERRED_ATTEND_BACK)


def _ends_of(step: Step, streams: int) -> tuple[tuple[Feature, ...], tuple[Feature, ...], tuple[Feature, ...]]:
    """What a whole part takes over, what it leaves, and what it leaves to its weight gradients."""
    part, stream = step.part, (Feature.STREAM,)
    if step.forward:
        takes = () if part in (Part.EMBEDDING, Part.JOIN) else stream
        return takes, (KEPT[part], *(() if part is Part.HEAD else stream)), ()
    # A head adds its gradient to that of the predictions behind it.
    takes = () if part is Part.HEAD else stream
    leaves = () if part is Part.EMBEDDING or (part is Part.HEAD and streams) else stream
    return (KEPT[part], *takes), leaves, (DEFERRED[part],)


def _holds(parts: Sequence[Sequence[Part]], chunks: tuple[int, ...], predictions: int) -> tuple[int, ...]:
    """Layers with experts and without, embedding, head and predictions."""
    held = [part for stage in chunks for part in parts[stage]]
    last = int(len(parts) - 1 in chunks)
    return held.count(Part.MOE) - last * predictions, held.count(Part.DENSE), int(0 in chunks), last, last * predictions


def _held(
    parts: Sequence[Sequence[Part]], chunks: Sequence[Sequence[int]], rank: NDArray, counts: NDArray
) -> NDArray[np.int64]:
    """The counts of chunks of every rank (N, 2 chunks + 4) as counts of features, and of whole units none."""
    of_stage = np.array([np.bincount(each, minlength=len(Part)) for each in parts])
    each, size = of_stage[np.array(chunks)][rank], len(chunks[0])  # (N, chunks, parts)
    held = np.zeros((len(rank), len(Feature) + 2 * len(UnitKind)), dtype=np.int64)
    for features, first in ((KEPT, 0), (DEFERRED, size)):
        held[:, features] = np.einsum("nc,ncp->np", counts[:, first : first + size], each)
    held[:, Feature.OUTPUT : Feature.RECEIVED + 1] = counts[:, 2 * size :]
    return held


def _largest(features: NDArray) -> NDArray:
    """The rows, sorted, that no other exceeds or equals in every number; activations are no smaller than a message."""
    measure = features.copy()
    measure[:, Feature.OUTPUT] = features[:, _SUMMED].sum(axis=1)
    measure[:, [Feature.GRADIENT, Feature.INCOMING, Feature.STREAM, Feature.RECEIVED]] = 0
    order = np.lexsort((*features.T, -measure.sum(axis=1)))
    best = unexceeded(measure[:, measure.any(axis=0)], order, features[order, _WORK].argmax(axis=1))
    largest = features[best]
    return largest[np.lexsort(largest.T[::-1])]

"""The instants at which a pipeline rank can hold most, as whole numbers that sizes in bytes are multiplied by.

`schedule.occupancy` says how many micro-batches each chunk of a rank holds while each action runs; here chunks become
layers. Ranks with equal layers are one class: of their instants only those stay that no other exceeds in every number,
so a class of forty instants of sixteen ranks is often one of three. Nothing here depends on a size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipermoe.schedule.action import Kind
from pipermoe.schedule.occupancy import growth
from pipermoe.specs.mesh import split_layers


class Feature(IntEnum):
    """What is counted: micro-batches times layers (or ends), messages, and the work in progress, which is one of six.

    KEPT from forward to backward; DEFERRED from I to W; a MESSAGE is the hidden state of a micro-batch. A layer of
    multi-token prediction counts as one with experts, a head and what joins the state with tokens before it.
    """

    KEPT_MOE = 0
    KEPT_DENSE = 1
    KEPT_HEAD = 2
    KEPT_EMBEDDING = 3
    DEFERRED_MOE = 4
    DEFERRED_DENSE = 5
    DEFERRED_HEAD = 6
    DEFERRED_EMBEDDING = 7
    OUTPUT = 8
    GRADIENT = 9
    INCOMING = 10
    FORWARD_MOE = 11
    FORWARD_DENSE = 12
    LOSS = 13
    MOE_B = 14
    DENSE_B = 15
    MOE_I = 16
    DENSE_I = 17
    RECEIVED = 18  # kept inputs that came from another rank: their category, not their bytes
    KEPT_JOIN = 19
    DEFERRED_JOIN = 20


DENSE, MOE, PREDICTION = 0, 1, 2  # kinds of layers; the last two have experts
_WORK = slice(Feature.FORWARD_MOE, Feature.DENSE_I + 1)
_SUMMED = (Feature.OUTPUT, Feature.GRADIENT, Feature.INCOMING, Feature.KEPT_MOE, Feature.KEPT_DENSE)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One way to cut a model and to work through it; `layers[i]` says whether layer i has experts.

    `predictions` layers of multi-token prediction are behind the last head.
    """

    schedule: str
    pipeline_parallel: int
    virtual_stages: int
    microbatches: int
    layers: tuple[bool, ...]
    layer_split: tuple[int, ...] = ()
    predictions: int = 0


@dataclass(frozen=True, slots=True)
class Instants:
    """`features[i]` of instant i, which belongs to class `owner[i]`; instants are sorted by class.

    `holds[c]` are the parts of class c in the order of StageShapes, `class_of[rank]` its ranks. `defers`: backwards
    leave their weight gradients to W actions.
    """

    features: NDArray[np.float64]  # (instants, len(Feature))
    owner: NDArray[np.int64]
    holds: NDArray[np.int64]  # (classes, parts)
    class_of: tuple[int, ...]
    defers: bool

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where the instants of each class begin."""
        return np.searchsorted(self.owner, np.arange(len(self.holds)))


@lru_cache(maxsize=8192)
def instants(pipeline: Pipeline, *, by_rank: bool = False) -> Instants:
    """The instants of every class of ranks; `by_rank` keeps every rank a class of its own."""
    stages = split_layers(
        len(pipeline.layers), pipeline.pipeline_parallel * pipeline.virtual_stages, pipeline.layer_split
    )
    found = growth(pipeline.schedule, pipeline.pipeline_parallel, pipeline.virtual_stages, pipeline.microbatches)
    counts, work = found.at(pipeline.microbatches), found.work
    chunks = found.stages_of
    holds = [_holds(pipeline, stages, chunks[rank]) for rank in range(pipeline.pipeline_parallel)]
    kinds = holds if by_rank else sorted(set(holds))
    class_of = tuple(range(len(holds))) if by_rank else tuple(map(kinds.index, holds))
    rows: list[list[NDArray]] = [[] for _ in kinds]
    kinds_of = [[MOE if pipeline.layers[layer] else DENSE for layer in layers] for layers in stages]
    kinds_of[-1] += [PREDICTION] * pipeline.predictions
    for (rank, kind, stage, beside), count in zip(work, counts, strict=True):
        base = _held(kinds_of, chunks[rank], count)
        if kind is Kind.FORWARD:
            rows[class_of[rank]].append(_with(base, {_forward(kinds_of[stage][-1]): 1}))
        elif beside >= 0:
            rows[class_of[rank]] += _in_turn(kinds_of, base, stage, beside)
        else:
            rows[class_of[rank]] += _backward(kinds_of, base, stage, defers=kind is Kind.INPUT_GRAD)
    best = [_largest(np.unique(np.array(each), axis=0)) for each in rows]
    return Instants(
        features=np.concatenate(best).astype(np.float64),
        owner=np.repeat(np.arange(len(kinds)), [len(each) for each in best]),
        holds=np.array(kinds, dtype=np.int64),
        class_of=class_of,
        defers=any(kind is Kind.INPUT_GRAD for _, kind, _, _ in work),
    )


def _holds(pipeline: Pipeline, stages: list[range], chunks: tuple[int, ...]) -> tuple[int, ...]:
    layers = [pipeline.layers[layer] for stage in chunks for layer in stages[stage]]
    last = int(len(stages) - 1 in chunks)
    return sum(layers), len(layers) - sum(layers), int(0 in chunks), last, last * pipeline.predictions


def _backward(kinds_of: list[list[int]], base: NDArray, stage: int, *, defers: bool) -> list[NDArray]:
    """The instants of a backward alone: the loss, and the first and last of all layers in a row that are alike."""
    found, here = [], kinds_of[stage]
    base = _enter(kinds_of, base, stage, found, defers=defers)
    for position in range(len(here) - 1, -1, -1):
        kind = here[position]
        if position in (0, len(here) - 1) or not here[position - 1] == kind == here[position + 1]:
            found.append(_with(base, {_work(kind, defers): 1}))
        base = _with(base, {_kept(kind): -1, _deferred(kind): int(defers)})
        if kind == PREDICTION:
            base = _with(base, {Feature.KEPT_JOIN: -1, Feature.DEFERRED_JOIN: int(defers)})
            base = _enter(kinds_of, base, stage, found, defers=defers)
    return found


def _in_turn(kinds_of: list[list[int]], base: NDArray, stage: int, beside: int) -> list[NDArray]:
    """The instants of a backward whose layers alternate with those of a forward.

    Weight gradients run in between: those of one layer at a time wait.
    """
    found, last = [], len(kinds_of) - 1
    back, forward = kinds_of[stage][::-1], kinds_of[beside]
    dense, predictions = forward.count(DENSE), forward.count(PREDICTION)
    not_yet = {Feature.KEPT_MOE: dense - len(forward), Feature.KEPT_DENSE: -dense}
    heads = {Feature.KEPT_HEAD: -(beside == last) - predictions, Feature.KEPT_JOIN: -predictions}
    base = _with(base, not_yet | heads)
    base = _enter(kinds_of, base, stage, found, defers=True)
    for turn in range(max(len(back), len(forward))):
        if turn < len(forward):
            base = _with(base, {_kept(forward[turn]): 1} | _ends(forward[turn], 1))
        if turn < len(back):
            waiting = {_deferred(back[turn - 1]): 1} if turn else {}
            found.append(_with(base, waiting | {_work(back[turn], defers=True): 1}))
            base = _with(base, {_kept(back[turn]): -1} | _ends(back[turn], -1))
    base = _with(base, {Feature.KEPT_HEAD: beside == last})
    return [*found, _with(base, {_deferred(back[-1]): 1, _forward(forward[-1]): 1})]


def _ends(kind: int, change: int) -> dict[Feature, int]:
    """What a layer of multi-token prediction has beside itself."""
    return {Feature.KEPT_JOIN: change, Feature.KEPT_HEAD: change} if kind == PREDICTION else {}


def _enter(kinds_of: list[list[int]], base: NDArray, stage: int, found: list[NDArray], *, defers: bool) -> NDArray:
    """What is held when a backward reaches its first layer; on the last stage it passes the loss before."""
    if stage == len(kinds_of) - 1:
        found.append(_with(base, {Feature.LOSS: 1}))
        return _with(base, {Feature.KEPT_HEAD: -1, Feature.DEFERRED_HEAD: int(defers)})
    return _with(base, {Feature.INCOMING: -1})  # the gradient that came is part of the work in progress


def _kept(kind: int) -> Feature:
    return Feature.KEPT_DENSE if kind == DENSE else Feature.KEPT_MOE


def _deferred(kind: int) -> Feature:
    return Feature.DEFERRED_DENSE if kind == DENSE else Feature.DEFERRED_MOE


def _forward(kind: int) -> Feature:
    return Feature.FORWARD_DENSE if kind == DENSE else Feature.FORWARD_MOE


def _work(kind: int, defers: bool) -> Feature:
    if kind == DENSE:
        return Feature.DENSE_I if defers else Feature.DENSE_B
    return Feature.MOE_I if defers else Feature.MOE_B


def _held(kinds_of: list[list[int]], chunks: tuple[int, ...], count: NDArray) -> NDArray:
    """The counts of chunks as counts of layers and ends."""
    features = np.zeros(len(Feature), dtype=np.int64)
    for c, stage in enumerate(chunks):
        kinds = kinds_of[stage]
        dense, predictions = kinds.count(DENSE), kinds.count(PREDICTION)
        heads = (stage == len(kinds_of) - 1) + predictions
        ends = np.array((len(kinds) - dense, dense, heads, stage == 0), dtype=np.int64)
        features[[Feature.KEPT_JOIN, Feature.DEFERRED_JOIN]] += predictions * count[[c, len(chunks) + c]]
        features[Feature.KEPT_MOE : Feature.KEPT_EMBEDDING + 1] += count[c] * ends
        features[Feature.DEFERRED_MOE : Feature.DEFERRED_EMBEDDING + 1] += count[len(chunks) + c] * ends
    outputs, gradients, incoming, received = count[2 * len(chunks) :]
    features[Feature.OUTPUT : Feature.INCOMING + 1] = outputs, gradients, incoming
    features[Feature.RECEIVED] = received
    return features


def _with(features: NDArray, changes: dict[Feature, int]) -> NDArray:
    changed = features.copy()
    for feature, change in changes.items():
        changed[feature] += change
    return changed


def _largest(features: NDArray) -> NDArray:
    """The rows that no other exceeds or equals in every number; activations are at least as large as a message."""
    measure = features.copy()
    measure[:, Feature.OUTPUT] = features[:, _SUMMED].sum(axis=1)
    measure[:, [Feature.GRADIENT, Feature.INCOMING, Feature.RECEIVED]] = 0
    order = np.lexsort((*features.T, -measure.sum(axis=1)))
    kept: list[int] = []
    for row in order:
        others = measure[kept]
        same = (others[:, _WORK] == measure[row, _WORK]).all(axis=1)
        if not (same & (others >= measure[row]).all(axis=1)).any():
            kept.append(int(row))
    return features[np.sort(kept)]

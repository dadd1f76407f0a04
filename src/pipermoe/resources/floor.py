"""A floor of the most that any rank of a strategy holds, which needs no schedule: for any number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.groups import Figures, Groups, Parts, Ways, classes_of_rows, largest_of_each
from pipermoe.resources.instants import DEFERRED, DEFERRING, FULL, KEPT, LEGS, Feature, pair_instants
from pipermoe.resources.kinds import distinct, runs
from pipermoe.resources.memory import EXPERTS, held_between_steps, prices
from pipermoe.resources.price_list import Price, cheapest, in_each
from pipermoe.resources.sharded_units import least_whole_bytes
from pipermoe.resources.stages import rank_classes
from pipermoe.resources.turns import Part
from pipermoe.schedule.ramps import Ramp, ramps
from pipermoe.schedule.traits import stages_of_ranks
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig

# By each part of a stage, in the order of StageShapes.
SHAPES = ((Part.MOE,), (Part.DENSE,), (Part.EMBEDDING,), (Part.HEAD,), (Part.MOE, Part.HEAD, Part.JOIN))
TOPS = (Part.MOE, Part.DENSE, Part.HEAD)  # what a backward can begin with
PAIR = [*range(Feature.STREAM, Feature.DEFERRED_ATTEND_BACK + 1), *LEGS]  # what a pair holds beside what it keeps


def memory_floor(
    model: ModelSpec,
    train: TrainConfig,
    table: StrategyTable,
    imbalance: float = 1.0,
    *,
    ways: Ways = ({},),
    levels: Ways = ({},),
) -> NDArray[np.float64]:
    """Bytes (rows,) that the peak does not undercut: states, and the activations that the schedule's ramp holds.

    With `ways` and `levels`, values of columns that only activations or only states read, each number is the least of
    all of them.
    """
    if not len(table):
        return np.zeros(0)
    price_of = floor_prices(partial(prices, model, train, imbalance=imbalance), ways)
    return grouped_floor(model, train, Groups(model, train, table), price_of, levels)


def grouped_floor(
    model: ModelSpec, train: TrainConfig, groups: Groups, price_of: Price, levels: Ways = ({},)
) -> NDArray[np.float64]:
    """`memory_floor` of the rows of `groups`, `price_of` being `floor_prices`."""
    found = [_floor(*pipeline, parts, number) for pipeline, parts, number in groups.of_schedules(groups.microbatches)]
    states = groups.states
    shapes, _ = classes_of_rows(found, np.tile(states.schedule, len(levels)))
    each = in_each(levels, states.table)
    least = held_between_steps(model, train, shapes, each) + least_whole_bytes(model, shapes, each, train.recipe.state)
    held = least.reshape(len(levels), len(states.table), -1).min(axis=0).T.copy()
    return groups.largest_sums(_activations(groups, found, price_of), held)


def _activations(groups: Groups, found: Sequence[_Floor], price_of: Price) -> Callable[[int, slice], Figures]:
    """Bytes of activations that every class of ranks of a schedule's combos holds at least: (classes, combos)."""
    inside = distinct([groups.insides.columns[name] for name in EXPERTS])  # how tokens are exchanged does not matter
    price = price_of(groups.insides.take(inside.rows))
    alike = runs([groups.head.of, inside.of[groups.inside.of]])
    kind = inside.of[groups.inside.of[alike.rows]]

    def most_held(schedule: int, piece: slice) -> Figures:
        of, floor = alike.of[piece], found[schedule]
        first, last = of[0], of[-1]
        held = floor.held @ price.take(kind[first : last + 1], axis=0).T
        return largest_of_each(held, floor.starts).take(of - first, axis=1)

    return most_held


class _Floor(NamedTuple):
    """What the classes of ranks of a pipeline hold, (classes, parts), how many ranks each has, and what is there at
    some instants as counts of `_floor_prices`: (instants, prices), sorted by class, of which class c begins at
    `starts[c]`.
    """

    holds: NDArray[np.int64]
    ranks: NDArray[np.int64]
    held: NDArray[np.float64]
    starts: list[int]


def floor_prices(price_of: Price, ways: Ways = ({},)) -> Price:
    """What floors count instead of `price_of`, which is `memory.prices`: of each number the least of all ways."""

    return cheapest(lambda table: _floor_prices(price_of(table)), ways)


def _floor_prices(price: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bytes (rows, prices): what a micro-batch keeps in each part of a stage, what it leaves to its weight gradients,
    by how much a backward at least exceeds what it finds, if it begins with any of a set of parts, and what a pair
    holds between its steps.
    """

    def shapes(features: Sequence[Feature]) -> list[NDArray[np.float64]]:
        return [price[:, [features[part] for part in shape]].sum(axis=1) for shape in SHAPES]

    works = [[FULL[top], DEFERRING[top], *([Feature.COMPUTE_BACK] if top is Part.MOE else [])] for top in TOPS]
    more = [price[:, work].min(axis=1) - price[:, KEPT[top]] for top, work in zip(TOPS, works, strict=True)]
    least = [np.min([more[top] for top in tops], axis=0) for tops in _TOP_SETS]
    return np.column_stack([*shapes(KEPT), *shapes(DEFERRED), *least, price[:, PAIR]])


_TOP_SETS = [[top for top in range(len(TOPS)) if each >> top & 1] for each in range(1, 1 << len(TOPS))]
# The columns of `_floor_prices`.
_KEPT = slice(0, len(SHAPES))
_WAITING = slice(_KEPT.stop, 2 * len(SHAPES))
_LEAST = slice(_WAITING.stop, _WAITING.stop + len(_TOP_SETS))
_PAIR = slice(_LEAST.stop, _LEAST.stop + len(PAIR))


@lru_cache(maxsize=8192)
def _floor(name: str, ranks: int, chunks: int, parts: Parts, microbatches: int) -> _Floor:
    stages_of = stages_of_ranks(name, ranks, chunks)
    holds, class_of, alike = rank_classes(stages_of, parts)
    found = ramps(name, ranks, chunks, microbatches)
    each = np.array(parts, dtype=np.int64)[np.array(stages_of)]  # (ranks, chunks, parts)
    paired = _pairs(each, class_of, [ramp.paired for ramp in found])
    instants = [_ramping(each, class_of, found), *paired]  # a class, then counts
    owner, *held = zip(*sorted({tuple(row) for each in instants for row in each.tolist()}), strict=True)
    starts = np.searchsorted(owner, np.arange(len(holds))).tolist()
    return _Floor(holds, alike, np.array(held, dtype=np.float64).T, starts)


def _ramping(each: NDArray[np.int64], class_of: NDArray[np.int64], found: Sequence[Ramp]) -> NDArray[np.int64]:
    """What every rank holds while a backward runs: rows of a class and counts."""
    held: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    for rank, ramp in enumerate(found):
        held += [(rank, kept, (0,) * len(kept)) for kept in ramp.kept]
        held += [(rank, kept, waiting) for kept, waiting in ramp.waiting]
    rank, *by_chunk = map(np.array, zip(*held, strict=True))
    counts = np.zeros((len(held), _PAIR.stop), dtype=np.int64)
    for columns, count in zip((_KEPT, _WAITING), by_chunk, strict=True):
        counts[:, columns] = np.einsum("ic,icp->ip", count, each[rank])
    counts[:, _LEAST] = _begins_with(each)[rank]
    return np.column_stack([class_of[rank], counts])


def _pairs(
    each: NDArray[np.int64], class_of: NDArray[np.int64], paired: Sequence[tuple[tuple[int, tuple[int, ...], int], ...]]
) -> Iterator[NDArray[np.int64]]:
    """The same of pairs of chunks of layers with experts alone, of the rank of a class that keeps most."""
    most: dict[tuple[int, int], tuple[NDArray[np.int64], int]] = {}
    for rank, pairs in enumerate(paired):
        for chunk, held, messages in pairs:
            layers, *others = each[rank, chunk].tolist()
            kept, key = np.array(held) @ each[rank], (int(class_of[rank]), layers)
            if layers and not any(others) and (key not in most or kept.sum() > most[key][0].sum()):
                most[key] = kept, messages
    for (owner, layers), (kept, messages) in most.items():
        found = pair_instants(layers)
        counts = np.zeros((len(found), _PAIR.stop), dtype=np.int64)
        counts[:, _KEPT], counts[:, _PAIR] = kept, found[:, PAIR]
        counts[:, _KEPT.start] += found[:, KEPT[Part.MOE]]
        counts[:, _WAITING.start] += found[:, DEFERRED[Part.MOE]]
        counts[:, _PAIR.start] += messages - 2  # as large as a stream; of two the pair has made its own
        yield np.column_stack([np.full(len(found), owner), counts])


def _begins_with(each: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of each set of parts whether backwards of a rank's chunks, (ranks, chunks, parts), begin with one of just it."""
    moe, dense, _, head, _ = np.moveaxis(each, 2, 0)
    first = ((moe > 0) & (head == 0), (dense > 0) & (head == 0), head > 0)  # in the order of TOPS
    tops = sum(found.any(axis=1) * (1 << top) for top, found in enumerate(first))
    return np.asarray(tops)[:, None] == np.arange(1, 1 << len(TOPS))

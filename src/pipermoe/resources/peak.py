"""The most that any rank of a strategy holds, and a floor of it that needs no schedule: for any number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.activations.sizes import RUNTIME, MemoryProfile
from pipermoe.resources.groups import Groups, Parts, Ways, alike_pipelines, largest_sum, per_group, pipeline_numbers
from pipermoe.resources.instants import DEFERRED, DEFERRING, FULL, KEPT, Feature, instants
from pipermoe.resources.kinds import distinct
from pipermoe.resources.memory import peak_activations, pipeline_of, prices
from pipermoe.resources.price_list import Price, in_each
from pipermoe.resources.sharded_units import least_whole_bytes, shardings, unit_bytes
from pipermoe.resources.spare_slots import balancing_bytes
from pipermoe.resources.stages import StageShapes
from pipermoe.resources.states import state_bytes, state_elements
from pipermoe.resources.turns import Part
from pipermoe.resources.whole_units import NOTHING_SHARDED
from pipermoe.schedule.ramps import ramps
from pipermoe.schedule.traits import stages_of_ranks
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig

# By each part of a stage, in the order of StageShapes.
SHAPES = ((Part.MOE,), (Part.DENSE,), (Part.EMBEDDING,), (Part.HEAD,), (Part.MOE, Part.HEAD, Part.JOIN))
TOPS = (Part.MOE, Part.DENSE, Part.HEAD)  # what a backward can begin with


def peak_bytes(
    model: ModelSpec,
    train: TrainConfig,
    table: StrategyTable,
    profile: MemoryProfile = RUNTIME,
    imbalance: float = 1.0,
) -> NDArray[np.float64]:
    """The most bytes that any rank of every strategy holds at any instant of a step: (rows,)."""
    if not len(table):
        return np.zeros(0)
    price = partial(prices, model, train, profile=profile, imbalance=imbalance)
    return grouped_peak_bytes(model, train, Groups(model, train, table), price)


def grouped_peak_bytes(model: ModelSpec, train: TrainConfig, groups: Groups, price_of: Price) -> NDArray[np.float64]:
    """`peak_bytes` of the rows of `groups`, `price_of` being `memory.prices`."""
    table, sharded = groups.table, shardings(groups.table)
    both = distinct([groups.both.of, sharded.of])  # rows by combo and what is sharded
    combo, mode = groups.both.of[both.rows], sharded.of[both.rows]
    pipe = distinct([groups.pipe.of[combo], groups.microbatches[combo], mode])
    pipelines = table.take(both.rows[pipe.rows])
    modes = [sharded.each[number] for number in mode[pipe.rows]]
    found = [instants(pipeline_of(model, train, pipelines, row, sharded=each)) for row, each in enumerate(modes)]
    width = max(len(each.starts) for each in found)
    price, inside = price_of(groups.combos.take(groups.inside.rows)), groups.inside.of[combo]
    activations = per_group(pipe.of, len(found), width, lambda rows, g: peak_activations(found[g], price, inside[rows]))
    # States depend on a pipeline by the classes of its ranks, and where there are whole units by its instants.
    instants_of = np.where(np.array([each == NOTHING_SHARDED for each in modes])[pipe.of], 0, 1 + pipe.of)
    state = distinct([groups.state.of, instants_of[both.of]])
    chosen = table.take(state.rows)
    of_unit = unit_bytes(model, chosen, train.recipe.state)

    def states(rows: NDArray, g: int) -> NDArray[np.float64]:
        held = _states(model, train, found[g].holds, chosen.take(rows))
        return held[:, found[g].owner] + of_unit[rows] @ found[g].whole.T

    held = per_group(pipe.of[both.of[state.rows]], len(found), width, states)
    return largest_sum(activations, both.of, held, state.of)


def memory_floor(
    model: ModelSpec,
    train: TrainConfig,
    table: StrategyTable,
    imbalance: float = 1.0,
    *,
    ways: Ways = ({},),
    levels: Ways = ({},),
    price_of: Price | None = None,
) -> NDArray[np.float64]:
    """Bytes (rows,) that the peak does not undercut: states, and the activations that the schedule's ramp holds.

    With `ways` and `levels`, values of columns that only activations or only states read, each number is the least of
    all of them. `price_of` is `memory.prices`.
    """
    if not len(table):
        return np.zeros(0)
    price_of = price_of or partial(prices, model, train, imbalance=imbalance)
    return grouped_floor(model, train, Groups(model, train, table), price_of, ways, levels)


def grouped_floor(
    model: ModelSpec,
    train: TrainConfig,
    groups: Groups,
    price_of: Price,
    ways: Ways = ({},),
    levels: Ways = ({},),
) -> NDArray[np.float64]:
    """`memory_floor` of the rows of `groups`, `price_of` being `memory.prices`."""
    combos, pipe = groups.combos, distinct([groups.pipe.of, groups.microbatches])
    pipelines = combos.take(pipe.rows)
    parts, microbatches = groups.pipe.of[pipe.rows], groups.microbatches[pipe.rows]
    found = [
        _floor(groups.parts[parts[row]], *pipeline_numbers(pipelines, row), int(microbatches[row]))
        for row in range(len(pipelines))
    ]
    width = max(len(each.holds) for each in found)
    insides = combos.take(groups.inside.rows)
    each = _floor_prices(price_of(in_each(ways, insides)))
    price = each.reshape(len(ways), len(insides), -1).min(axis=0)[groups.inside.of]
    activations = per_group(
        pipe.of,
        len(found),
        width,
        lambda rows, g: np.maximum.reduceat(price[rows] @ found[g].held.T, found[g].starts, axis=1),
    )
    chosen, alike = groups.table.take(groups.state.rows), alike_pipelines(found)

    def least_states(rows: NDArray, g: int) -> NDArray[np.float64]:
        each, holds = in_each(levels, chosen.take(rows)), found[g].holds
        least = _states(model, train, holds, each)
        least += least_whole_bytes(model, StageShapes(*holds.T), each, train.recipe.state)
        return least.reshape(len(levels), len(rows), -1).min(axis=0)

    states = per_group(alike[pipe.of[groups.both.of[groups.state.rows]]], len(found), width, least_states)
    return groups.largest_sum(activations, states)


def _states(
    model: ModelSpec, train: TrainConfig, holds: NDArray[np.int64], table: StrategyTable
) -> NDArray[np.float64]:
    """Bytes of weights, gradients and optimizer state on every class of ranks: (rows, classes)."""
    shapes = StageShapes(*holds.T)
    held = state_bytes(state_elements(model, shapes, table), train.recipe.state)
    moving = balancing_bytes(model, train, table, shapes)
    return np.asarray(sum(held.values()) + sum(moving.values()), dtype=np.float64)


class _Floor(NamedTuple):
    """What the classes of ranks of a pipeline hold, (classes, parts), how many ranks each has, and what is there at
    some instants as counts of `_floor_prices`: (instants, prices), sorted by class, of which class c begins at
    `starts[c]`.
    """

    holds: NDArray[np.int64]
    ranks: NDArray[np.int64]
    held: NDArray[np.float64]
    starts: NDArray[np.int64]


def _floor_prices(price: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bytes (rows, prices): what a micro-batch keeps in each part of a stage, what it leaves to its weight gradients,
    and by how much a backward at least exceeds what it finds, if it begins with any of a set of parts.
    """

    def shapes(features: Sequence[Feature]) -> list[NDArray[np.float64]]:
        return [price[:, [features[part] for part in shape]].sum(axis=1) for shape in SHAPES]

    works = [[FULL[top], DEFERRING[top], *([Feature.COMPUTE_BACK] if top is Part.MOE else [])] for top in TOPS]
    more = [price[:, work].min(axis=1) - price[:, KEPT[top]] for top, work in zip(TOPS, works, strict=True)]
    least = [np.min([more[top] for top in tops], axis=0) for tops in _TOP_SETS]
    return np.stack([*shapes(KEPT), *shapes(DEFERRED), *least], axis=1)


_TOP_SETS = [[top for top in range(len(TOPS)) if each >> top & 1] for each in range(1, 1 << len(TOPS))]


@lru_cache(maxsize=8192)
def _floor(parts: Parts, name: str, ranks: int, chunks: int, microbatches: int) -> _Floor:
    count = np.array(parts, dtype=np.int64)
    stages_of = stages_of_ranks(name, ranks, chunks)
    held = [count[list(stages)].sum(axis=0) for stages in stages_of]
    holds, class_of, alike = np.unique(held, axis=0, return_inverse=True, return_counts=True)
    found = [
        (owner, *(np.array(kept) @ each), *(np.array(waiting) @ each), *_begins_with(each))
        for owner, each, ramp in zip(
            class_of.ravel().tolist(),
            (count[list(stages)] for stages in stages_of),
            ramps(name, ranks, chunks, microbatches),
            strict=True,
        )
        for kept, waiting in (*((kept, (0,) * len(each)) for kept in ramp.kept), *ramp.waiting)
    ]
    rows = np.unique(np.array(found), axis=0)
    return _Floor(holds, alike, rows[:, 1:].astype(np.float64), np.searchsorted(rows[:, 0], np.arange(len(holds))))


def _begins_with(stages: NDArray[np.int64]) -> list[int]:
    """Of each set of parts whether backwards of these stages (stages, parts) begin with one of just that set."""
    moe, dense, _, head, _ = stages.T
    tops = (moe * (1 - head) > 0).any() + 2 * (dense * (1 - head) > 0).any() + 4 * head.any()
    return [int(tops == each) for each in range(1, 1 << len(TOPS))]

"""The most that any rank of a strategy holds at any instant of its schedule: for any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.activations.sizes import RUNTIME, MemoryProfile
from pipermoe.resources.groups import Groups, sorted_by
from pipermoe.resources.instants import instants
from pipermoe.resources.kinds import distinct
from pipermoe.resources.memory import held_between_steps, peak_activations, pipeline_of, prices
from pipermoe.resources.price_list import Price
from pipermoe.resources.sharded_units import shardings, unit_bytes
from pipermoe.resources.stages import StageShapes
from pipermoe.resources.whole_units import NOTHING_SHARDED
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig

BLOCK = 1 << 14  # rows that stay in the cache


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
    both = distinct([groups.combo, sharded.of])  # rows by combo and what is sharded
    combo, mode = groups.combo[both.rows], sharded.of[both.rows]
    pipe = distinct([groups.schedule.of[groups.head.of[combo]], mode])
    pipelines = table.take(both.rows[pipe.rows])
    modes = [sharded.each[number] for number in mode[pipe.rows]]
    found = [instants(pipeline_of(model, train, pipelines, row, sharded=each)) for row, each in enumerate(modes)]
    width = max(len(each.starts) for each in found)
    price, inside = price_of(groups.insides), groups.inside.of[combo]

    def in_work(rows: NDArray, g: int, most: NDArray) -> None:
        most[: len(found[g].starts)] = peak_activations(found[g], price, inside[rows])

    activations = _per_group(pipe.of, len(found), width, in_work)
    # States depend on a pipeline by the classes of its ranks, and where there are whole units by its instants.
    instants_of = np.where(np.array([each == NOTHING_SHARDED for each in modes])[pipe.of], 0, 1 + pipe.of)
    state = distinct([groups.state, instants_of[both.of]])
    chosen = table.take(state.rows)
    of_unit = unit_bytes(model, chosen, train.recipe.state)

    def states(rows: NDArray, g: int, most: NDArray) -> None:
        held = held_between_steps(model, train, StageShapes(*found[g].holds.T), chosen.take(rows))
        most[: len(found[g].starts)] = (held[:, found[g].owner] + of_unit[rows] @ found[g].whole.T).T

    held = _per_group(pipe.of[both.of[state.rows]], len(found), width, states)
    return _largest_sum(activations, both.of, held, state.of)


def _per_group(
    group: NDArray, count: int, width: int, fill: Callable[[NDArray, int, NDArray], None]
) -> NDArray[np.float64]:
    """(width, rows): of every group `fill(rows, g, found)` writes to `found`, (width, rows); what it leaves is -inf."""
    result = np.full((width, len(group)), -np.inf)
    order = sorted_by(group, count)
    bounds = np.searchsorted(group[order], np.arange(count + 1)).tolist()
    for index, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            fill(order[start:end], index, result[:, start:end])
    everywhere = np.empty_like(result)
    everywhere[:, order] = result
    return everywhere


def _largest_sum(
    some: NDArray[np.float64], some_of: NDArray[np.int64], others: NDArray[np.float64], other_of: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The maximum over classes of the sum of two tables, (classes, kinds) of their own; row i is of the kinds
    `some_of[i]` and `other_of[i]`: (rows,).
    """
    pairs = [(a, b) for a, b in zip(some, others, strict=True) if a.max() > -np.inf]
    total = np.full(len(some_of), -np.inf)
    room = np.empty((2, BLOCK))
    for start in range(0, len(total), BLOCK):
        rows = slice(start, start + BLOCK)
        mine, theirs, most = some_of[rows], other_of[rows], total[rows]
        each, other = room[:, : len(most)]
        for a, b in pairs:
            a.take(mine, out=each, mode="clip")  # "raise" would buffer
            b.take(theirs, out=other, mode="clip")
            each += other
            np.maximum(most, each, out=most)
    return total

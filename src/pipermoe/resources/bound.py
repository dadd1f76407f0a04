"""Lower bounds of a step's seconds, for any number of rows: what no simulation of a strategy undercuts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.chains import Chains
from pipermoe.resources.groups import Groups, alike_pipelines, per_group
from pipermoe.resources.kinds import distinct
from pipermoe.resources.step import closing_costs, compute_slots
from pipermoe.resources.unit_seconds import columns, exchange_units, unit_seconds
from pipermoe.specs.legality import copies_fit
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig


def step_bound(
    model: ModelSpec, platform: Platform, train: TrainConfig, table: StrategyTable, imbalance: float = 1.0
) -> NDArray[np.float64]:
    """Seconds (rows,) that no simulation of a row undercuts, whatever the order of its schedule.

    The longest chain of the pipeline and the reduction of gradients where it ends, then the agreement on their norm,
    the update and the gathering of weights. Ranks that share cores compute together no faster than the cores.
    """
    if not len(table):
        return np.zeros(0)
    return grouped_bound(model, platform, train, Groups(model, train, table), imbalance)


def pipeline_bound(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    table: StrategyTable,
    imbalance: float = 1.0,
    ways: Sequence[Mapping[str, int]] = (),
) -> NDArray[np.float64]:
    """The part of `step_bound` that ZeRO does not change: the longest chain of the pipeline alone, (rows,).

    With `ways`, values of columns on which only collectives depend, each takes what it takes in the cheapest way.
    """
    if not len(table):
        return np.zeros(0)
    groups = Groups(model, train, table)
    return _chain_seconds(model, platform, train, groups, imbalance, ways).max(axis=1)[groups.both.of]


def grouped_bound(
    model: ModelSpec, platform: Platform, train: TrainConfig, groups: Groups, imbalance: float
) -> NDArray[np.float64]:
    """`step_bound` of the rows of `groups`."""
    pipe, found = groups.chains(platform)
    ends = _chain_seconds(model, platform, train, groups, imbalance)
    chosen, alike = groups.table.take(groups.state.rows), alike_pipelines(found)
    width = ends.shape[1]
    closing = per_group(
        alike[pipe.of[groups.both.of[groups.state.rows]]],
        len(found),
        width + 1,
        lambda rows, g: _closing(model, platform, train, found[g], chosen.take(rows), width),
    )
    return groups.largest_sum(ends, closing[:, :width]) + closing[:, width].take(groups.state.of)


def _chain_seconds(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    groups: Groups,
    imbalance: float,
    ways: Sequence[Mapping[str, int]] = (),
) -> NDArray[np.float64]:
    """Seconds of the longest chain of every combo: first of what its cores compute, then of every class of ranks."""
    combos, (pipe, found) = groups.combos, groups.chains(platform)
    insides = combos.take(groups.inside.rows)
    price = _cheapest(model, platform, train, insides, imbalance, ways)[groups.inside.of]
    shares = _shares(platform, combos)

    def seconds(rows: NDArray, g: int) -> NDArray[np.float64]:
        chain, microbatches = found[g], groups.microbatches[rows, None]
        paths = _sums(price[rows], chain.once) + microbatches * _sums(price[rows], chain.each)
        together = microbatches * _sums(price[rows], chain.computed[None]) * shares[rows, None]
        return np.concatenate([together, np.maximum.reduceat(paths, chain.starts, axis=1)], axis=1)

    return per_group(pipe.of, len(found), 1 + max(len(each.holds) for each in found), seconds)


def _sums(price: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """price (rows, U) times counts (paths, U), summed over U in its order: (rows, paths)."""
    total = np.zeros((len(price), len(counts)))
    for column in np.flatnonzero(counts.any(axis=0)):
        total += price[:, column, None] * counts[None, :, column]
    return total


def _shares(platform: Platform, table: StrategyTable) -> NDArray[np.float64]:
    """Ranks of a stage per core: what they compute together lasts at least so many times as long."""
    worlds = distinct([table.world_size])
    slots = np.array([compute_slots(platform, int(world)) for world in table.world_size[worlds.rows]])
    return table.ranks_per_stage / slots[worlds.of]


def _closing(
    model: ModelSpec, platform: Platform, train: TrainConfig, found: Chains, table: StrategyTable, width: int
) -> NDArray[np.float64]:
    """What follows a chain, as `_chain_seconds`, and in column `width` what follows when all ranks have agreed."""
    costs = closing_costs(model, platform, train, found.shapes, table)
    share = _shares(platform, table)[:, None]
    crowding = np.maximum(1.0, found.ranks.sum() * share)
    norm, update = (_together(each, found.ranks) * share for each in (costs.norm, costs.update))
    after = np.full((len(table), width + 1), -np.inf)
    after[:, :1] = norm
    after[:, 1 : 1 + len(found.holds)] = costs.reduce + costs.norm * crowding
    last = np.maximum((costs.update + costs.gather).max(axis=1), update[:, 0])
    after[:, width] = costs.flags[:, 0] + last
    return after


def _together(each: Any, ranks: NDArray[np.int64]) -> Any:
    """The sum over all ranks of what those of each class take (rows, classes), in their order: (rows, 1)."""
    return sum(each[:, c : c + 1] * count for c, count in enumerate(ranks))


def _cheapest(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    table: StrategyTable,
    imbalance: float,
    ways: Sequence[Mapping[str, int]],
) -> NDArray[np.float64]:
    """`unit_seconds` of every row as it is, or each price in the cheapest of the `ways` that exist for it."""
    price = unit_seconds(model, platform, train, table, imbalance)
    for way in ways:
        other = table.with_columns(**{name: np.full(len(table), code) for name, code in way.items()})
        rows = np.flatnonzero(copies_fit(other))
        if not len(rows):
            continue
        for work, seconds in exchange_units(model, platform, train, other.take(rows), imbalance).items():
            price[rows, columns(work)] = np.minimum(price[rows, columns(work)], seconds)
    return price

"""Lower bounds of a step's seconds, for any number of rows: what no simulation of a strategy undercuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.chains import Chains
from pipermoe.resources.groups import Figures, Groups, Ways, classes_of_rows, largest_of_each
from pipermoe.resources.kinds import distinct
from pipermoe.resources.price_list import Price, cheapest, in_each
from pipermoe.resources.stages import StageShapes
from pipermoe.resources.step import closing_costs, compute_slots
from pipermoe.resources.unit_seconds import SENDS, unit_seconds
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig

TICKS = float(1 << 34)  # a second: prices are rounded down to whole ticks, whose sums are exact in any order below 2^53


def step_bound(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    table: StrategyTable,
    imbalance: float = 1.0,
    *,
    ways: Ways = ({},),
    levels: Ways = ({},),
    price_of: Price | None = None,
) -> NDArray[np.float64]:
    """Seconds (rows,) that no simulation of a row undercuts, whatever the order of its schedule.

    The longest chain of the pipeline and the reduction of gradients where it ends, then the agreement on their norm,
    the update and the gathering of weights. Ranks that share cores compute together no faster than the cores.
    With `ways`, values of columns that only the collectives of a layer read, and `levels`, of ZeRO, each part takes
    what it takes at best. `price_of` is `unit_seconds`.
    """
    if not len(table):
        return np.zeros(0)
    price_of = price_of or partial(unit_seconds, model, platform, train, imbalance=imbalance)
    return grouped_bound(model, platform, train, Groups(model, train, table, levels), price_of, ways)


def grouped_bound(
    model: ModelSpec, platform: Platform, train: TrainConfig, groups: Groups, price_of: Price, ways: Ways = ({},)
) -> NDArray[np.float64]:
    """`step_bound` of the rows of `groups`, `price_of` being `unit_seconds`."""
    found, states, levels = groups.chains(), groups.states, groups.levels
    crowding = _crowding(platform, groups.heads)
    first = int(np.isinf(crowding).all())  # where no cores are shared, classes of ranks alone count
    seconds = _chain_seconds(platform, groups, found, crowding, price_of, ways)
    shapes, ranks = classes_of_rows(found, np.tile(states.schedule, len(levels)))
    each = _closing(model, platform, train, shapes, ranks, in_each(levels, states.table))
    after = each.reshape(len(levels), len(states.table), -1).min(axis=0).T.copy()
    return groups.largest_sums(lambda schedule, piece: seconds(schedule, piece)[first:], after[first:])


def _chain_seconds(
    platform: Platform, groups: Groups, found: Sequence[Chains], crowding: Figures, price_of: Price, ways: Ways
) -> Callable[[int, slice], Figures]:
    """Seconds of the longest chain of a schedule's combos, (1 + classes, combos): first of what the cores compute, then
    of every class of ranks.
    """
    least, hop, of = cheapest(price_of, ways)(groups.insides), groups.nearest_hops(platform), groups.head.of
    kinds = distinct([groups.inside.of, hop[of]])
    inside, hop = groups.inside.of[kinds.rows], hop[of][kinds.rows]
    price = np.floor(np.column_stack([least[inside, :SENDS], least[inside, SENDS + hop]]) * TICKS)
    used = np.flatnonzero(price.any(axis=0))
    price, microbatches = price.take(used, axis=1) / TICKS, groups.microbatches[groups.schedule.rows].tolist()

    def seconds(schedule: int, piece: slice) -> Figures:
        chain, repeats = found[schedule], microbatches[schedule]
        counts = (chain.once + repeats * chain.each).take(used, axis=1)
        paths = counts @ price.take(kinds.of[piece], axis=0).T
        paths[0] *= crowding[of[piece]]
        paths[chain.limited] *= 1 / chain.over
        return largest_of_each(paths, chain.starts)

    return seconds


def _crowding(platform: Platform, heads: StrategyTable) -> Figures:
    """How many times as long as on a core each what all ranks of a stage compute takes. Where every rank has a core for
    itself, -inf: the one that computes most is no earlier than all of them together.
    """
    share = _shares(platform, heads)
    return np.where(share * heads.pipeline_parallel > 1, share, -np.inf)


def _shares(platform: Platform, table: StrategyTable) -> NDArray[np.float64]:
    """Ranks of a stage per core: what they compute together lasts at least so many times as long."""
    worlds = distinct([table.world_size])
    slots = np.array([compute_slots(platform, int(world)) for world in table.world_size[worlds.rows]])
    return table.ranks_per_stage / slots[worlds.of]


def _closing(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    shapes: StageShapes,
    ranks: NDArray[np.int64],
    table: StrategyTable,
) -> NDArray[np.float64]:
    """What follows a chain, as `_chain_seconds`: (rows, 1 + classes)."""
    costs = closing_costs(model, platform, train, shapes, table)
    share = _shares(platform, table)[:, None]
    crowding = np.maximum(1.0, ranks.sum(axis=1)[:, None] * share)
    norm, update = (_together(each, ranks) * share for each in (costs.norm, costs.update))
    there = ranks > 0
    ends = np.where(there, costs.reduce + costs.norm * crowding, -np.inf)
    alone = np.where(there, costs.update + costs.gather, -np.inf).max(axis=1)
    last = costs.flags + np.maximum(alone[:, None], update)
    return np.concatenate([norm, ends], axis=1) + last


def _together(each: Any, ranks: NDArray[np.int64]) -> Any:
    """The sum over all ranks of what those of each class take (rows, classes), in their order: (rows, 1)."""
    return sum(each[:, c : c + 1] * ranks[:, c : c + 1] for c in range(ranks.shape[1]))

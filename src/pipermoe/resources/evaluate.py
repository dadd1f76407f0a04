"""Many strategies at once: peak memory and a lower bound of the step, for a million rows in a fraction of a second.

Few of a million rows differ in what a formula reads: activations and the pipeline do not depend on ZeRO, states and
their reduction not on the micro-batch. Each formula is evaluated for the rows that differ for it and gathered for all
others. Every figure of a row is made of its own numbers in the same order, so it is the same alone as among others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.activations.sizes import RUNTIME, MemoryProfile
from pipermoe.resources.chains import Chains, chains
from pipermoe.resources.communication import hop_levels
from pipermoe.resources.instants import Feature, instants
from pipermoe.resources.kinds import BLOCK, Kinds, distinct
from pipermoe.resources.memory import peak_activations, pipeline_of, prices
from pipermoe.resources.sharded_units import whole_unit_bytes
from pipermoe.resources.spare_slots import balancing_bytes
from pipermoe.resources.stages import StageShapes, stage_shapes
from pipermoe.resources.states import state_bytes, state_elements
from pipermoe.resources.step import closing_costs, compute_slots
from pipermoe.resources.unit_seconds import columns, exchange_units, unit_seconds
from pipermoe.schedule.ramps import ramps
from pipermoe.schedule.traits import schedule_traits, stages_of_ranks
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy_table import SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

# What the formulas read.
INSIDE = (
    *("micro_batch_size", "context_parallel", "tensor_parallel", "expert_parallel", "expert_tensor_parallel"),
    *("recompute", "recompute_modules", "dispatcher", "ranks_per_copy", "exchange"),
)
PIPELINE = ("schedule", "pipeline_parallel", "virtual_stages", "layer_split")
DEGREES = ("data_parallel", "context_parallel", "tensor_parallel", "expert_parallel", "expert_tensor_parallel")
STATES = ("expert_data_parallel", "zero_dense", "zero_expert")

KEPT = (  # of one micro-batch by each part of a stage, in the order of StageShapes
    (Feature.KEPT_MOE,),
    (Feature.KEPT_DENSE,),
    (Feature.KEPT_EMBEDDING,),
    (Feature.KEPT_HEAD,),
    (Feature.KEPT_MOE, Feature.KEPT_HEAD, Feature.KEPT_JOIN),
)

Parts = tuple[tuple[int, ...], ...]  # of every stage, in the order of StageShapes


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Peak bytes of the worst rank and a lower bound of the step's seconds: arrays (rows,)."""

    peak_bytes: NDArray[np.float64]
    bound: NDArray[np.float64]


def evaluate(
    model: ModelSpec, platform: Platform, train: TrainConfig, table: StrategyTable, imbalance: float = 1.0
) -> Evaluation:
    """Memory and time of every row; `imbalance` is the busiest rank's rows over the mean."""
    if not len(table):
        return Evaluation(np.zeros(0), np.zeros(0))
    groups = _Groups(model, train, table)
    return Evaluation(
        _peak_bytes(model, train, groups, RUNTIME, imbalance), _bound(model, platform, train, groups, imbalance)
    )


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
    return _peak_bytes(model, train, _Groups(model, train, table), profile, imbalance)


def memory_floor(
    model: ModelSpec, train: TrainConfig, table: StrategyTable, imbalance: float = 1.0
) -> NDArray[np.float64]:
    """Bytes (rows,) that the peak does not undercut: states, and the activations that the schedule's ramp holds."""
    if not len(table):
        return np.zeros(0)
    groups = _Groups(model, train, table)
    combos, pipe = groups.combos, distinct([groups.pipe.of, groups.microbatches])
    pipelines = combos.take(pipe.rows)
    parts, microbatches = groups.pipe.of[pipe.rows], groups.microbatches[pipe.rows]
    found = [
        _floor(groups.parts[parts[row]], *_numbers(pipelines, row), int(microbatches[row]))
        for row in range(len(pipelines))
    ]
    width = max(len(each.holds) for each in found)
    total = prices(model, train, combos.take(groups.inside.rows), RUNTIME, imbalance)
    price = np.stack([total[:, list(kept)].sum(axis=1) for kept in KEPT], axis=1)[groups.inside.of]
    activations = _per_group(
        pipe.of,
        len(found),
        width,
        lambda rows, g: np.maximum.reduceat(price[rows] @ found[g].kept.T, found[g].starts, axis=1),
    )
    chosen, alike = groups.table.take(groups.state.rows), _alike(found)
    states = _per_group(
        alike[pipe.of[groups.both.of[groups.state.rows]]],
        len(found),
        width,
        lambda rows, g: _states(model, train, found[g].holds, chosen.take(rows), defers=True),
    )
    return groups.largest_sum(activations, states)


def _alike(found: Sequence[_Floor] | Sequence[Chains]) -> NDArray[np.int64]:
    """Of every pipeline the first one whose classes of ranks hold the same, as many of each."""
    known: dict[bytes, int] = {}
    keys = (each.holds.tobytes() + each.ranks.tobytes() for each in found)
    return np.array([known.setdefault(key, place) for place, key in enumerate(keys)])


class _Floor(NamedTuple):
    """What the classes of ranks of a pipeline hold, (classes, parts), how many ranks each has, and what they keep at
    least: (instants, parts) in micro-batches, sorted by class, of which class c begins at `starts[c]`.
    """

    holds: NDArray[np.int64]
    ranks: NDArray[np.int64]
    kept: NDArray[np.float64]
    starts: NDArray[np.int64]


@lru_cache(maxsize=8192)
def _floor(parts: Parts, name: str, ranks: int, chunks: int, microbatches: int) -> _Floor:
    count = np.array(parts, dtype=np.int64)
    stages_of = stages_of_ranks(name, ranks, chunks)
    held = [count[list(stages)].sum(axis=0) for stages in stages_of]
    holds, class_of, alike = np.unique(held, axis=0, return_inverse=True, return_counts=True)
    found = [
        (owner, *(np.array(kept) @ count[list(stages)]))
        for owner, stages, ramp in zip(
            class_of.ravel().tolist(), stages_of, ramps(name, ranks, chunks, microbatches), strict=True
        )
        for kept in ramp.kept
    ]
    rows = np.unique(np.array(found), axis=0)
    return _Floor(holds, alike, rows[:, 1:].astype(np.float64), np.searchsorted(rows[:, 0], np.arange(len(holds))))


def step_bound(
    model: ModelSpec, platform: Platform, train: TrainConfig, table: StrategyTable, imbalance: float = 1.0
) -> NDArray[np.float64]:
    """Seconds (rows,) that no simulation of a row undercuts, whatever the order of its schedule.

    The longest chain of the pipeline and the reduction of gradients where it ends, then the agreement on their norm,
    the update and the gathering of weights. Ranks that share cores compute together no faster than the cores.
    """
    if not len(table):
        return np.zeros(0)
    return _bound(model, platform, train, _Groups(model, train, table), imbalance)


def pipeline_bound(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    table: StrategyTable,
    imbalance: float = 1.0,
    exchanges: Sequence[int] = (),
) -> NDArray[np.float64]:
    """The part of `step_bound` that ZeRO does not change: the longest chain of the pipeline alone, (rows,).

    With `exchanges`, codes of that column, every collective takes what it takes with the cheapest of them.
    """
    if not len(table):
        return np.zeros(0)
    groups = _Groups(model, train, table)
    return _chain_seconds(model, platform, train, groups, imbalance, exchanges).max(axis=1)[groups.both.of]


def _cheapest(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    table: StrategyTable,
    imbalance: float,
    exchanges: Sequence[int],
) -> NDArray[np.float64]:
    """`unit_seconds` of every row as it is, or each price with the cheapest of `exchanges`."""
    price = unit_seconds(model, platform, train, table, imbalance)
    for code in exchanges:
        other = table.with_columns(exchange=np.full(len(table), code))
        for work, seconds in exchange_units(model, platform, train, other, imbalance).items():
            price[:, columns(work)] = np.minimum(price[:, columns(work)], seconds)
    return price


class _Groups:
    """The rows of a table by what a formula reads: `both` is pipeline and what happens inside a stage."""

    def __init__(self, model: ModelSpec, train: TrainConfig, table: StrategyTable) -> None:
        self.model, self.table = model, table
        names = (*PIPELINE, *INSIDE, "data_parallel")
        self.both = distinct([getattr(table, name) for name in names])
        self.combos = table.take(self.both.rows)
        self.microbatches = self.combos.microbatches(train.global_batch_size)
        self.inside = distinct([getattr(self.combos, name) for name in INSIDE])
        self.pipe = distinct([getattr(self.combos, name) for name in PIPELINE])

    def chains(self, platform: Platform) -> tuple[Kinds, list[Chains]]:
        """The chains of every pipeline, which depend on how far apart its ranks lie and on few micro-batches."""
        few = np.minimum(self.microbatches, 2 * self.combos.pipeline_parallel)  # what ramps up
        pipe = distinct([self.pipe.of, self.combos.ranks_per_stage, few])
        pipelines = self.combos.take(pipe.rows)
        levels = tuple(level.ranks for level in platform.levels)
        found = []
        for row in range(len(pipelines)):
            name, ranks, chunks = _numbers(pipelines, row)
            hops = _hops(name, ranks, chunks, int(pipelines.ranks_per_stage[row]), levels)
            parts = self.parts[int(self.pipe.of[pipe.rows[row]])]
            found.append(chains(name, ranks, chunks, parts, hops, len(levels), int(few[pipe.rows[row]])))
        return pipe, found

    @cached_property
    def parts(self) -> list[Parts]:
        """What the stages of every pipeline hold."""
        pipelines = self.combos.take(self.pipe.rows)
        numbers = zip(pipelines.num_stages.tolist(), pipelines.layer_split.tolist(), strict=True)
        known: dict[tuple[int, int], Parts] = {}
        found = []
        for stages, split in numbers:
            if (stages, split) not in known:
                shapes = stage_shapes(self.model, stages, pipelines.splits[split])
                known[stages, split] = tuple(
                    zip(*(getattr(shapes, field.name).tolist() for field in fields(shapes)), strict=True)
                )
            found.append(known[stages, split])
        return found

    @cached_property
    def layout(self) -> NDArray[np.int64]:
        """Of every combo a number of what its ranks hold, and whether they leave weight gradients for later."""
        known: dict[tuple, int] = {}
        pipelines = self.combos.take(self.pipe.rows)
        layouts = [known.setdefault(_layout(self.model, pipelines, row), len(known)) for row in range(len(pipelines))]
        return np.array(layouts)[self.pipe.of]

    @cached_property
    def state(self) -> Kinds:
        """The rows by what states, and their reduction, read: from ZeRO-2 on also the number of micro-batches."""
        degrees = [self.layout, *(getattr(self.combos, name) for name in ("pipeline_parallel", *DEGREES))]
        once = distinct(degrees)
        per_microbatch = distinct([once.of, self.microbatches])
        repeats = (self.table.zero_dense >= 2) | (self.table.zero_expert >= 2)
        both = self.both.of
        column = np.where(repeats, (len(once.rows) + per_microbatch.of)[both], once.of[both])
        return distinct([column, *(getattr(self.table, name) for name in STATES)])

    def largest_sum(self, by_combo: NDArray[np.float64], by_state: NDArray[np.float64]) -> NDArray[np.float64]:
        """The maximum over classes of (combos, classes) and (states, classes), both gathered: (rows,)."""
        pairs = list(zip(by_combo.T.copy(), by_state.T.copy(), strict=True))
        total = np.empty(len(self.table))
        for start in range(0, len(total), BLOCK):
            rows = slice(start, start + BLOCK)
            combo, state = self.both.of[rows], self.state.of[rows]
            each = (held.take(combo) + kept.take(state) for held, kept in pairs)
            total[rows] = next(each)
            for one in each:
                np.maximum(total[rows], one, out=total[rows])
        return total


@lru_cache(maxsize=8192)
def _hops(name: str, ranks: int, chunks: int, ranks_per_stage: int, levels: tuple[int, ...]) -> tuple[int, ...]:
    """The levels of the network between each stage and the next, `levels[i]` ranks being on one of level i."""
    return tuple(hop_levels(levels, np.array([ranks_per_stage]), stages_of_ranks(name, ranks, chunks))[0].tolist())


def _layout(model: ModelSpec, pipelines: StrategyTable, row: int) -> tuple:
    name, ranks, chunks = _numbers(pipelines, row)
    held = stages_of_ranks(name, ranks, chunks)
    return (
        pipelines.splits[int(pipelines.layer_split[row])],
        ranks * chunks,
        tuple(sorted(map(tuple, held))),
        schedule_traits(name, ranks, chunks).splits_backward,
    )


def _numbers(table: StrategyTable, row: int) -> tuple[str, int, int]:
    return (
        SCHEDULE_NAMES[int(table.schedule[row])],
        int(table.pipeline_parallel[row]),
        int(table.virtual_stages[row]),
    )


def _per_group(
    group: NDArray, count: int, width: int, evaluate: Callable[[NDArray, int], NDArray]
) -> NDArray[np.float64]:
    """`evaluate(rows, g)`, (rows, up to width), for the rows of every group; what is not there is -inf."""
    result = np.full((len(group), width), -np.inf)
    order = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[order], np.arange(count + 1))
    for index in range(count):
        rows = order[bounds[index] : bounds[index + 1]]
        if len(rows):
            found = evaluate(rows, index)
            result[rows, : found.shape[1]] = found
    return result


def _peak_bytes(
    model: ModelSpec, train: TrainConfig, groups: _Groups, profile: MemoryProfile, imbalance: float
) -> NDArray[np.float64]:
    combos = groups.combos
    pipe = distinct([groups.pipe.of, groups.microbatches])
    pipelines = combos.take(pipe.rows)
    found = [instants(pipeline_of(model, train, pipelines, row)) for row in range(len(pipelines))]
    width = max(len(each.holds) for each in found)
    price = prices(model, train, combos.take(groups.inside.rows), profile, imbalance)
    inside = groups.inside.of
    activations = _per_group(
        pipe.of, len(found), width, lambda rows, g: peak_activations(found[g], price, inside[rows])
    )
    chosen = groups.table.take(groups.state.rows)
    states = _per_group(
        pipe.of[groups.both.of[groups.state.rows]],
        len(found),
        width,
        lambda rows, g: _states(model, train, found[g].holds, chosen.take(rows), defers=found[g].defers),
    )
    return groups.largest_sum(activations, states)


def _states(
    model: ModelSpec, train: TrainConfig, holds: NDArray[np.int64], table: StrategyTable, *, defers: bool
) -> NDArray[np.float64]:
    """Bytes of weights, gradients and optimizer state, whole units included: (rows, classes)."""
    shapes, per_parameter = StageShapes(*holds.T), train.recipe.state
    held = state_bytes(state_elements(model, shapes, table), per_parameter)
    moving = balancing_bytes(model, train, table, shapes)
    whole = whole_unit_bytes(model, shapes, table, per_parameter, defers=defers)
    return sum(held.values()) + sum(moving.values()) + whole


def _bound(
    model: ModelSpec, platform: Platform, train: TrainConfig, groups: _Groups, imbalance: float
) -> NDArray[np.float64]:
    pipe, found = groups.chains(platform)
    ends = _chain_seconds(model, platform, train, groups, imbalance)
    chosen, alike = groups.table.take(groups.state.rows), _alike(found)
    width = ends.shape[1]
    closing = _per_group(
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
    groups: _Groups,
    imbalance: float,
    exchanges: Sequence[int] = (),
) -> NDArray[np.float64]:
    """Seconds of the longest chain of every combo: first of what its cores compute, then of every class of ranks."""
    combos, (pipe, found) = groups.combos, groups.chains(platform)
    insides = combos.take(groups.inside.rows)
    price = _cheapest(model, platform, train, insides, imbalance, exchanges)[groups.inside.of]
    shares = _shares(platform, combos)

    def seconds(rows: NDArray, g: int) -> NDArray[np.float64]:
        chain, microbatches = found[g], groups.microbatches[rows, None]
        paths = _sums(price[rows], chain.once) + microbatches * _sums(price[rows], chain.each)
        together = microbatches * _sums(price[rows], chain.computed[None]) * shares[rows, None]
        return np.concatenate([together, np.maximum.reduceat(paths, chain.starts, axis=1)], axis=1)

    return _per_group(pipe.of, len(found), 1 + max(len(each.holds) for each in found), seconds)


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

"""The rows of a table by what a formula reads.

Few of a million rows differ in what a formula reads: activations and the pipeline do not depend on ZeRO, states and
their reduction not on the micro-batch. Each formula is evaluated for the rows that differ for it and gathered for all
others. Every figure of a row is made of its own numbers in the same order, so it is the same alone as among others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.chains import Chains, chains
from pipermoe.resources.communication import hop_levels
from pipermoe.resources.kinds import BLOCK, Kinds, distinct
from pipermoe.resources.stages import StageShapes, shapes_of
from pipermoe.resources.unit_seconds import COMPUTED, EXCHANGED, SHAPE
from pipermoe.schedule.traits import schedule_traits, stages_of_ranks
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy_table import SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

# What the formulas read.
INSIDE = (*COMPUTED, *(name for name in EXCHANGED if name not in COMPUTED))
PIPELINE = ("schedule", "pipeline_parallel", "virtual_stages", "layer_split")
PLACE = ("data_parallel", "expert_data_parallel", "rank_order")  # how ranks lie
DEGREES = ("pipeline_parallel", *PLACE, *SHAPE[1:])

Ways = Sequence[Mapping[str, int]]  # values of columns that a row may have instead of its own
Parts = tuple[tuple[int, ...], ...]  # of every stage, in the order of StageShapes


class Groups:
    """The rows of a table by what a formula reads: `both` is pipeline and what happens inside a stage.

    With `levels`, values of the columns of ZeRO, rows are grouped for any of them instead of for their own.
    """

    def __init__(self, model: ModelSpec, train: TrainConfig, table: StrategyTable, levels: Ways = ({},)) -> None:
        self.model, self.table, self.levels = model, table, levels
        names = (*PIPELINE, *INSIDE, *PLACE)
        self.both = distinct([getattr(table, name) for name in names])
        self.combos = table.take(self.both.rows)
        self.microbatches = self.combos.microbatches(train.global_batch_size)
        self.inside = distinct([getattr(self.combos, name) for name in INSIDE])
        self.pipe = distinct([getattr(self.combos, name) for name in PIPELINE])

    def chains(self) -> tuple[Kinds, list[Chains]]:
        """The chains of every pipeline, which depend on few micro-batches."""
        few = np.minimum(self.microbatches, 2 * self.combos.pipeline_parallel)  # what ramps up
        pipe = distinct([self.pipe.of, few])
        pipelines = self.combos.take(pipe.rows)
        found = [
            chains(*pipeline_numbers(pipelines, row), self.parts[int(self.pipe.of[combo])], int(few[combo]))
            for row, combo in enumerate(pipe.rows.tolist())
        ]
        return pipe, found

    def nearest_hops(self, platform: Platform) -> NDArray[np.int64]:
        """The lowest level of the network that lies between two stages of each combo; 0 where there is none."""
        levels = tuple(level.ranks for level in platform.levels)
        columns = (self.combos.stage_stride, self.combos.runs_per_stage)
        kinds = distinct([self.pipe.of, *columns])
        pipelines, lying = self.combos.take(kinds.rows), (column[kinds.rows].tolist() for column in columns)
        nearest = [
            _nearest_hop(*pipeline_numbers(pipelines, row), stride, runs, levels)
            for row, (stride, runs) in enumerate(zip(*lying, strict=True))
        ]
        return np.array(nearest)[kinds.of]

    @cached_property
    def parts(self) -> list[Parts]:
        """What the stages of every pipeline hold."""
        model, pipelines = self.model, self.combos.take(self.pipe.rows)
        layers = tuple(map(model.is_moe, range(model.num_layers)))
        numbers = zip(pipelines.num_stages.tolist(), pipelines.layer_split.tolist(), strict=True)
        return [_parts(layers, model.mtp_layers, stages, pipelines.splits[split]) for stages, split in numbers]

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
        once = distinct([self.layout, *(getattr(self.combos, name) for name in DEGREES)])
        per_microbatch = distinct([once.of, self.microbatches])
        levels = self.table.zero_dense, self.table.zero_expert
        repeats = (levels[0] >= 2) | (levels[1] >= 2)
        repeats |= any(level >= 2 for each in self.levels for level in each.values())
        both = self.both.of
        column = np.where(repeats, (len(once.rows) + per_microbatch.of)[both], once.of[both])
        return distinct([column, *levels])

    def largest_sum(self, by_combo: NDArray[np.float64], by_state: NDArray[np.float64]) -> NDArray[np.float64]:
        """The maximum over classes of (combos, classes) and (states, classes), both gathered: (rows,)."""
        return largest_sum(by_combo, self.both.of, by_state, self.state.of)


@lru_cache(maxsize=8192)
def _parts(layers: tuple[bool, ...], predictions: int, stages: int, split: tuple[int, ...]) -> Parts:
    shapes = shapes_of(layers, predictions, stages, split)
    return tuple(zip(*(getattr(shapes, field.name).tolist() for field in fields(shapes)), strict=True))


@lru_cache(maxsize=8192)
def _nearest_hop(name: str, ranks: int, chunks: int, stride: int, runs: int, levels: tuple[int, ...]) -> int:
    """Where some are farther the bound is lower by so much."""
    [found] = hop_levels(levels, np.array([stride]), np.array([runs]), stages_of_ranks(name, ranks, chunks))
    return min((hop for hop in found.tolist() if hop >= 0), default=0)


def _layout(model: ModelSpec, pipelines: StrategyTable, row: int) -> tuple:
    name, ranks, chunks = pipeline_numbers(pipelines, row)
    held = stages_of_ranks(name, ranks, chunks)
    return (
        pipelines.splits[int(pipelines.layer_split[row])],
        ranks * chunks,
        tuple(sorted(map(tuple, held))),
        schedule_traits(name, ranks, chunks).splits_backward,
    )


def pipeline_numbers(table: StrategyTable, row: int) -> tuple[str, int, int]:
    return (
        SCHEDULE_NAMES[int(table.schedule[row])],
        int(table.pipeline_parallel[row]),
        int(table.virtual_stages[row]),
    )


def per_group(
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


def largest_sum(
    some: NDArray[np.float64], some_of: NDArray[np.int64], others: NDArray[np.float64], other_of: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The maximum over columns of the sum of two tables; row i reads `some_of[i]` and `other_of[i]`: (rows,)."""
    pairs = list(zip(some.T.copy(), others.T.copy(), strict=True))
    total = np.empty(len(some_of))
    for start in range(0, len(total), BLOCK):
        rows = slice(start, start + BLOCK)
        mine, theirs = some_of[rows], other_of[rows]
        each = (a.take(mine) + b.take(theirs) for a, b in pairs)
        total[rows] = next(each)
        for one in each:
            np.maximum(total[rows], one, out=total[rows])
    return total


class Classes(Protocol):
    """Something known of a pipeline's classes of ranks."""

    @property
    def holds(self) -> NDArray[np.int64]:
        """Parts of every class: (classes, parts)."""
        ...

    @property
    def ranks(self) -> NDArray[np.int64]:
        """How many ranks each class has."""
        ...


def classes_of_rows(found: Sequence[Classes], pipeline: NDArray) -> tuple[StageShapes, NDArray[np.int64]]:
    """What the classes of every row's pipeline hold and how many ranks they have, (rows, most classes); 0 for none."""
    width = max(len(each.ranks) for each in found)
    ranks = np.zeros((len(found), width), dtype=np.int64)
    holds = np.zeros((len(found), width, found[0].holds.shape[1]), dtype=np.int64)
    for place, each in enumerate(found):
        ranks[place, : len(each.ranks)] = each.ranks
        holds[place, : len(each.ranks)] = each.holds
    return StageShapes(*np.moveaxis(holds[pipeline], 2, 0)), ranks[pipeline]

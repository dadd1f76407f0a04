"""The rows of a table by what a formula reads.

Few of a million rows differ in what a formula reads: activations and the pipeline do not depend on ZeRO, states and
their reduction not on the micro-batch. Each formula is evaluated for the rows that differ for it and gathered for all
others. Every figure of a row is made of its own numbers in the same order, so it is the same alone as among others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.chains import Chains, chains
from pipermoe.resources.communication import hop_levels
from pipermoe.resources.kinds import Kinds, distinct, runs
from pipermoe.resources.stages import StageShapes, shapes_of
from pipermoe.resources.unit_seconds import COMPUTED, EXCHANGED, SHAPE
from pipermoe.schedule.builders import Homes
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
ZERO_LEVELS = 4
HEAD = (*PIPELINE, *PLACE, *SHAPE)  # all but what is recomputed and sharded and how tokens travel

Ways = Sequence[Mapping[str, int]]  # values of columns that a row may have instead of its own
Parts = tuple[tuple[int, ...], ...]  # of every stage, in the order of StageShapes


class States(NamedTuple):
    """A table of the states that differ, the schedule of one combo with each of them, and the state `of` every row."""

    table: StrategyTable
    schedule: NDArray[np.int64]
    of: NDArray[np.int64]


class Groups:
    """The rows of a table by what a formula reads: `both` is pipeline and what happens inside a stage.

    Of these `combos` those with one arrangement, micro-batch and schedule share one of the `heads`: what depends on
    these alone is worked out for them. `schedule` is pipeline and number of micro-batches. With `levels`, values of the
    columns of ZeRO, rows are grouped for any of them instead of for their own.
    """

    def __init__(self, model: ModelSpec, train: TrainConfig, table: StrategyTable, levels: Ways = ({},)) -> None:
        self.model, self.table, self.levels = model, table, levels
        self.both = _combos(table)
        self.combos = table.take(self.both.rows)
        self.head = distinct(_columns(self.combos, HEAD))
        self.heads = self.combos.take(self.head.rows)
        shape = distinct(_columns(self.heads, SHAPE)).of[self.head.of]
        self.inside = distinct([shape, *_columns(self.combos, [name for name in INSIDE if name not in SHAPE])])
        self._microbatches = self.heads.microbatches(train.global_batch_size)
        self._pipe = distinct(_columns(self.heads, PIPELINE))
        self._schedule = distinct([self._pipe.of, self._microbatches])
        self.pipe, self.schedule = self._pipe.within(self.head), self._schedule.within(self.head)
        self.microbatches = self._microbatches[self.head.of]

    def chains(self) -> list[Chains]:
        """The chains of every schedule, which depend on few micro-batches."""
        pipelines, numbers = self.combos.take(self.schedule.rows), self.pipe.of[self.schedule.rows].tolist()
        few = np.minimum(self.microbatches[self.schedule.rows], 2 * pipelines.pipeline_parallel)  # what ramps up
        return [
            chains(*pipeline_numbers(pipelines, row), self.parts[number], int(few[row]))
            for row, number in enumerate(numbers)
        ]

    def nearest_hops(self, platform: Platform) -> NDArray[np.int64]:
        """The lowest level of the network that lies between two stages of each combo; 0 where there is none."""
        kinds = distinct([self._pipe.of, self.heads.stage_stride, self.heads.runs_per_stage])
        chosen, levels = self.heads.take(kinds.rows), [level.ranks for level in platform.levels]
        alike: dict[Homes, list[int]] = {}
        for row in range(len(chosen)):
            alike.setdefault(stages_of_ranks(*pipeline_numbers(chosen, row)), []).append(row)
        nearest = np.zeros(len(chosen), dtype=np.int64)
        for stages_of, rows in alike.items():
            hops = hop_levels(levels, chosen.stage_stride[rows], chosen.runs_per_stage[rows], stages_of)
            nearest[rows] = np.where(hops < 0, len(levels), hops).min(axis=1)
        return np.where(nearest < len(levels), nearest, 0)[kinds.of][self.head.of]

    @cached_property
    def parts(self) -> list[Parts]:
        """What the stages of every pipeline hold."""
        model, pipelines = self.model, self.combos.take(self.pipe.rows)
        layers = tuple(map(model.is_moe, range(model.num_layers)))
        numbers = zip(pipelines.num_stages.tolist(), pipelines.layer_split.tolist(), strict=True)
        return [_parts(layers, model.mtp_layers, stages, pipelines.splits[split]) for stages, split in numbers]

    @cached_property
    def _layout(self) -> NDArray[np.int64]:
        """Of every head a number of what its ranks hold, and whether they leave weight gradients for later."""
        known: dict[tuple, int] = {}
        pipelines = self.combos.take(self.pipe.rows)
        layouts = [known.setdefault(_layout(self.model, pipelines, row), len(known)) for row in range(len(pipelines))]
        return np.array(layouts)[self._pipe.of]

    @cached_property
    def states(self) -> States:
        """What states, and their reduction, read: from ZeRO-2 on also the number of micro-batches."""
        dense, expert = _columns(self.table, ("zero_dense", "zero_expert"))
        number = (self.head.of * ZERO_LEVELS**2).take(self.both.of) + (dense * ZERO_LEVELS + expert)
        known = np.zeros(len(self.heads) * ZERO_LEVELS**2, dtype=bool)
        known[number] = True
        head, zero = np.divmod(np.flatnonzero(known), ZERO_LEVELS**2)
        dense, expert = np.divmod(zero, ZERO_LEVELS)
        once = distinct([self._layout, *_columns(self.heads, DEGREES)])
        per_microbatch = distinct([once.of, self._microbatches])
        repeats = (dense >= 2) | (expert >= 2) | any(level >= 2 for each in self.levels for level in each.values())
        alike = distinct([np.where(repeats, len(once.rows) + per_microbatch.of[head], once.of[head]), zero])
        table = self.heads.take(head[alike.rows])
        return States(
            table.with_columns(zero_dense=dense[alike.rows], zero_expert=expert[alike.rows]),
            self._schedule.of[head[alike.rows]],
            alike.of[np.cumsum(known) - 1].take(number),
        )

    def largest_sum(self, by_combo: NDArray[np.float64], by_state: NDArray[np.float64]) -> NDArray[np.float64]:
        """The maximum over classes of (classes, combos) and (classes, states), both gathered: (rows,)."""
        return largest_sum(by_combo, self.both.of, by_state, self.states.of)


def _columns(table: StrategyTable, names: Sequence[str]) -> list[NDArray[np.integer]]:
    return [table.columns[name] for name in names]


def _combos(table: StrategyTable) -> Kinds:
    """Tables mostly hold rows that agree side by side: then nothing is sorted."""
    columns = _columns(table, (*PIPELINE, *INSIDE, *PLACE))
    alike = runs(columns)
    return alike if 2 * len(alike.rows) <= len(table) else distinct(columns)


@lru_cache(maxsize=8192)
def _parts(layers: tuple[bool, ...], predictions: int, stages: int, split: tuple[int, ...]) -> Parts:
    shapes = shapes_of(layers, predictions, stages, split)
    return tuple(zip(*(getattr(shapes, field.name).tolist() for field in fields(shapes)), strict=True))


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
    group: NDArray, count: int, width: int, fill: Callable[[NDArray, int, NDArray], None]
) -> NDArray[np.float64]:
    """(width, rows): of every group `fill(rows, g, found)` writes to `found`, (width, rows); what it leaves is -inf."""
    result = np.full((width, len(group)), -np.inf)
    order = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[order], np.arange(count + 1)).tolist()
    for index, (start, end) in enumerate(pairwise(bounds)):
        if start < end:
            fill(order[start:end], index, result[:, start:end])
    everywhere = np.empty_like(result)
    everywhere[:, order] = result
    return everywhere


def largest_of_each(rows: NDArray[np.float64], starts: Iterable[int], found: NDArray[np.float64]) -> None:
    """Into `found` the maximum over the rows of each group, of which one begins at each of `starts`."""
    for place, (start, end) in enumerate(pairwise([*starts, len(rows)])):
        np.maximum.reduce(rows[start:end], axis=0, out=found[place])


BLOCK = 1 << 14  # rows that stay in the cache


def largest_sum(
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

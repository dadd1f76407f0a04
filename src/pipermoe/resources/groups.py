"""The rows of a table by what a formula reads.

Few of a million rows differ in what a formula reads: activations and the pipeline do not depend on ZeRO, states and
their reduction not on the micro-batch. Each formula is evaluated for the rows that differ for it and gathered for all
others. Every figure of a row is made of its own numbers in the same order, so it is the same alone as among others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.chains import Chains, chains
from pipermoe.resources.communication import hop_levels
from pipermoe.resources.kinds import Kinds, begins, distinct
from pipermoe.resources.stages import StageShapes, shapes_of
from pipermoe.resources.unit_seconds import COMPUTED, EXCHANGED, SHAPE
from pipermoe.schedule.builders import RECIPES
from pipermoe.schedule.traits import stages_of_ranks
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy_table import SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

# What the formulas read.
INSIDE = (*COMPUTED, *(name for name in EXCHANGED if name not in COMPUTED))
PIPELINE = ("schedule", "pipeline_parallel", "virtual_stages", "layer_split")
PLACE = ("data_parallel", "expert_data_parallel", "rank_order")  # how ranks lie
HEAD = (*PIPELINE, *PLACE, *SHAPE)
TAIL = tuple(name for name in INSIDE if name not in SHAPE)  # what is recomputed, and how tokens travel
DEGREES = ("pipeline_parallel", *PLACE, *SHAPE[1:])
ZERO_LEVELS = 4
BLOCK = 1 << 11  # combos whose figures stay in the cache

Ways = Sequence[Mapping[str, int]]  # values of columns that a row may have instead of its own
Parts = tuple[tuple[int, ...], ...]  # of every stage, in the order of StageShapes
Figures = NDArray[np.float64]


class States(NamedTuple):
    """A table of the states that differ, the schedule of a combo with each of them, and the state `of` every head under
    each of the levels of ZeRO that occur, `zero`: (levels, heads).
    """

    table: StrategyTable
    schedule: NDArray[np.int64]
    zero: NDArray[np.int64]
    of: NDArray[np.int64]


class Groups:
    """The rows of a table by what a formula reads: those that differ in ZeRO alone are one of the combos.

    Of these, those with one arrangement, micro-batch and schedule share one of the `heads`: what depends on these alone
    is worked out for them. A `schedule` is a pipeline, `pipe`, with a number of micro-batches; both are kinds of heads,
    `head` and `inside`, what happens inside a stage, kinds of combos. Combos are sorted by head, heads by schedule.
    `rows` are the first of every combo in the table. With `levels`, values of the columns of ZeRO, rows are grouped for
    any of them instead of for their own.
    """

    def __init__(self, model: ModelSpec, train: TrainConfig, table: StrategyTable, levels: Ways = ({},)) -> None:
        self.model, self.table, self.levels = model, table, levels
        of_heads, of_tails = (begins(_columns(table, names)) for names in (HEAD, TAIL))
        starts = np.flatnonzero(of_heads | of_tails)  # of runs: rows that agree in all but ZeRO with the one before
        head = _heads(table, np.flatnonzero(of_heads), train.global_batch_size)
        head_of_run = head.of[np.cumsum(of_heads[starts]) - 1]
        combos = _combos(head_of_run, _columns(table, TAIL, starts), len(table))
        order = sorted_by(head_of_run[combos.rows], len(head.rows))
        self.rows = starts[combos.rows[order]]
        self.head = Kinds(head.rows, head_of_run[combos.rows[order]])
        self._runs = _inverse(order)[combos.of], np.diff(starts, append=len(table))
        self.heads = table.take(head.rows)
        self.microbatches = self.heads.microbatches(train.global_batch_size)
        self.pipe = distinct(_columns(self.heads, PIPELINE))
        self.schedule = distinct([self.pipe.of, self.microbatches])
        shape = distinct(_columns(self.heads, SHAPE)).of[self.head.of]
        self.inside = distinct([shape, *_columns(table, TAIL, self.rows)])

    @cached_property
    def combo(self) -> NDArray[np.int64]:
        """The combo of every row."""
        return np.repeat(*self._runs)

    @cached_property
    def insides(self) -> StrategyTable:
        """A row of every kind of `inside`."""
        return self.table.take(self.rows[self.inside.rows])

    def pieces(self) -> Iterator[tuple[int, slice]]:
        """Every schedule with combos of it that fit in the cache."""
        bounds = np.searchsorted(self.schedule.of[self.head.of], np.arange(len(self.schedule.rows) + 1)).tolist()
        for schedule, (first, end) in enumerate(pairwise(bounds)):
            for start in range(first, end, BLOCK):
                yield schedule, slice(start, min(start + BLOCK, end))

    def chains(self) -> list[Chains]:
        """The chains of every schedule, which depend on few micro-batches."""
        few = np.minimum(self.microbatches, 2 * self.heads.pipeline_parallel)  # what ramps up
        return [chains(*pipeline, parts, least) for pipeline, parts, least in self.of_schedules(few)]

    def of_schedules(self, number: NDArray[np.int64]) -> Iterator[tuple[tuple[str, int, int], Parts, int]]:
        """Every schedule's pipeline, the parts of its stages, and a number of its heads."""
        heads = self.schedule.rows
        pipelines = pipelines_of(self.heads.take(heads))
        parts = (self.parts[pipe] for pipe in self.pipe.of[heads].tolist())
        return zip(pipelines, parts, number[heads].tolist(), strict=True)

    def nearest_hops(self, platform: Platform) -> NDArray[np.int64]:
        """The lowest level of the network that lies between two stages of each head; 0 where there is none."""
        kinds = distinct([self.pipe.of, self.heads.stage_stride, self.heads.runs_per_stage])
        chosen, levels = self.heads.take(kinds.rows), [level.ranks for level in platform.levels]
        stride, runs = chosen.stage_stride, chosen.runs_per_stage
        alike: dict[tuple, list[int]] = {}
        for row, (name, ranks, chunks) in enumerate(pipelines_of(chosen)):
            alike.setdefault((RECIPES[name].homes, ranks, chunks), []).append(row)
        nearest = np.zeros(len(chosen), dtype=np.int64)
        for (homes, ranks, chunks), rows in alike.items():
            hops = hop_levels(levels, stride[rows], runs[rows], homes(ranks, chunks))
            nearest[rows] = np.where(hops < 0, len(levels), hops).min(axis=1)
        return np.where(nearest < len(levels), nearest, 0)[kinds.of]

    @cached_property
    def parts(self) -> list[Parts]:
        """What the stages of every pipeline hold."""
        model, pipelines = self.model, self.heads.take(self.pipe.rows)
        layers = tuple(map(model.is_moe, range(model.num_layers)))
        numbers = zip(pipelines.num_stages.tolist(), pipelines.layer_split.tolist(), strict=True)
        return [_parts(layers, model.mtp_layers, stages, pipelines.splits[split]) for stages, split in numbers]

    @cached_property
    def _layout(self) -> NDArray[np.int64]:
        """Of every head a number of what its ranks hold."""
        known: dict[tuple, int] = {}
        pipelines = self.heads.take(self.pipe.rows)
        splits = (pipelines.splits[split] for split in pipelines.layer_split.tolist())
        found = (_layout(*pipeline, split) for pipeline, split in zip(pipelines_of(pipelines), splits, strict=True))
        return np.array([known.setdefault(each, len(known)) for each in found])[self.pipe.of]

    @cached_property
    def zero(self) -> NDArray[np.uint8]:
        """The levels of ZeRO of every row as one number."""
        dense, expert = _columns(self.table, ("zero_dense", "zero_expert"))
        return (dense * ZERO_LEVELS + expert).astype(np.uint8)

    @cached_property
    def states(self) -> States:
        """What states, and their reduction, read: from ZeRO-2 on also the number of micro-batches."""
        zero = np.flatnonzero(np.bincount(self.zero))
        dense, expert = np.divmod(zero, ZERO_LEVELS)
        once = distinct([self._layout, *_columns(self.heads, DEGREES)])
        per_microbatch = distinct([once.of, self.microbatches])
        repeats = (dense >= 2) | (expert >= 2) | any(level >= 2 for each in self.levels for level in each.values())
        of_level = np.where(repeats[:, None], len(once.rows) + per_microbatch.of, once.of)
        level, head = (each.ravel() for each in np.indices(of_level.shape))
        alike = distinct([of_level.ravel(), level])
        level, head = level[alike.rows], head[alike.rows]
        table = self.heads.take(head).with_columns(zero_dense=dense[level], zero_expert=expert[level])
        return States(table, self.schedule.of[head], zero, alike.of.reshape(of_level.shape))

    @property
    def _level(self) -> NDArray[np.int64]:
        """The place of every number of `zero` among those that occur."""
        return np.searchsorted(self.states.zero, np.arange(ZERO_LEVELS**2))

    @cached_property
    def state(self) -> NDArray[np.int64]:
        """The state of every row."""
        return self.states.of[self._level[self.zero], self.head.of[self.combo]]

    def largest_sums(self, by_combo: Callable[[int, slice], Figures], by_state: Figures) -> Figures:
        """The maximum over classes of the figures of a row's combo and state: (rows,).

        `by_combo(schedule, piece)` finds (classes, combos) of a piece, `by_state` are (classes, states); a schedule has
        the first of all classes. It is worked out for every combo with every level, few of which do not occur.
        """
        held = by_state.take(self.states.of, axis=1)  # (classes, levels, heads)
        figures = np.empty((held.shape[1], len(self.rows)))
        for schedule, piece in self.pieces():
            mine = by_combo(schedule, piece)
            sums = held[: len(mine)].take(self.head.of[piece], axis=2)
            sums += mine[:, None]
            np.maximum.reduce(sums, axis=0, out=figures[:, piece])
        return figures.ravel().take(self._place)

    @cached_property
    def _place(self) -> NDArray[np.int64]:
        """Of every row among all combos under any levels."""
        place = (self._level * len(self.rows))[self.zero]
        place += self.combo
        return place


def _columns(
    table: StrategyTable, names: Sequence[str], rows: NDArray | slice = slice(None)
) -> list[NDArray[np.integer]]:
    return [table.columns[name][rows] for name in names]


def _combos(head: NDArray[np.int64], tail: list[NDArray[np.integer]], rows: int) -> Kinds:
    """The kinds of runs by head and tail: where most of the `rows` agree with the one before, each is its own."""
    every = np.arange(len(head))
    return Kinds(every, every) if 2 * len(head) <= rows else distinct([head, *tail])


def _heads(table: StrategyTable, rows: NDArray[np.int64], global_batch_size: int) -> Kinds:
    """The kinds of `rows` by all but their tails, sorted by schedule: their rows in the table, and the kind of each."""
    chosen = table.take(rows)
    microbatches = chosen.microbatches(global_batch_size)
    found = distinct([*_columns(chosen, PIPELINE), microbatches, *_columns(chosen, (*PLACE, *SHAPE))])
    return Kinds(rows[found.rows], found.of)


def sorted_by(kind: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The order of rows by `kind`, below `count`; narrow numbers are sorted without comparing."""
    return np.argsort(kind.astype(np.min_scalar_type(count)), kind="stable")


def _inverse(order: NDArray[np.int64]) -> NDArray[np.int64]:
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place


@lru_cache(maxsize=8192)
def _parts(layers: tuple[bool, ...], predictions: int, stages: int, split: tuple[int, ...]) -> Parts:
    shapes = shapes_of(layers, predictions, stages, split)
    return tuple(zip(*(getattr(shapes, field.name).tolist() for field in fields(shapes)), strict=True))


def _layout(name: str, ranks: int, chunks: int, split: tuple[int, ...]) -> tuple:
    return split, ranks * chunks, tuple(sorted(stages_of_ranks(name, ranks, chunks)))


def pipelines_of(table: StrategyTable) -> Iterator[tuple[str, int, int]]:
    """Schedule, ranks and chunks of a rank of every row."""
    names = map(SCHEDULE_NAMES.__getitem__, table.schedule.tolist())
    return zip(names, table.pipeline_parallel.tolist(), table.virtual_stages.tolist(), strict=True)


def largest_of_each(rows: Figures, starts: Sequence[int]) -> Figures:
    """The maximum over the rows of each group, of which one begins at each of `starts`."""
    found = np.empty((len(starts), rows.shape[1]))
    for place, (start, end) in enumerate(pairwise([*starts, len(rows)])):
        np.maximum.reduce(rows[start:end], axis=0, out=found[place])
    return found


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

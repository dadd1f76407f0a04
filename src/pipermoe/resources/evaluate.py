"""Many strategies at once: peak memory and a lower bound of the step, for a million rows in a fraction of a second.

Few of a million rows differ in what a formula reads: activations do not depend on ZeRO, states not on the schedule.
Each formula is evaluated for the rows that differ for it and gathered for all others. Memory is a sum of whole numbers
below 2^53 and so exact in any order: a row weighs the same alone as among others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.activations.sizes import RUNTIME, MemoryProfile
from pipermoe.resources.instants import Instants, instants
from pipermoe.resources.memory import peak_activations, pipeline_of, prices
from pipermoe.resources.sharded_units import whole_unit_bytes
from pipermoe.resources.stages import StageShapes
from pipermoe.resources.states import state_bytes, state_elements
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig

# What the formulas read.
INSIDE = (
    *("micro_batch_size", "context_parallel", "tensor_parallel", "expert_parallel", "expert_tensor_parallel"),
    *("recompute", "recompute_modules"),
)
PIPELINE = ("schedule", "pipeline_parallel", "virtual_stages", "layer_split")
STATES = (
    *("data_parallel", "context_parallel", "tensor_parallel"),
    *("expert_parallel", "expert_data_parallel", "expert_tensor_parallel", "zero_dense", "zero_expert"),
)
HASH_FACTOR = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: Knuth, TAOCP volume 3, section 6.4
HASH_BITS = 16
BLOCK = 1 << 15  # rows; a block and the slots stay in the cache


def distinct(columns: Sequence[NDArray]) -> tuple[NDArray, NDArray]:
    """The rows that differ in `columns`: (index of one row of each kind, kind of every row). Entries are at least 0."""
    code, used = np.zeros(len(columns[0]), dtype=np.int64), 0
    for column in columns:
        bits = int(column.max()).bit_length()
        if used + bits > 63:
            kinds, code = _kinds(code)
            used = len(kinds).bit_length()
        code, used = code << bits | column, used + bits
    return _kinds(code)


def _kinds(code: NDArray[np.int64]) -> tuple[NDArray, NDArray]:
    """One row of each kind of `code`, and the kind of every row: a hash table instead of a sort.

    A slot belongs to one of the codes that reach it first; rows with another code in its slot try again elsewhere.
    """
    kind = np.empty(len(code), dtype=np.int64)
    chosen: list[NDArray] = []
    pending, known, factor = np.arange(len(code)), 0, HASH_FACTOR
    while len(pending):
        mine = code[pending] if known else code
        slot, owner, agrees = _slots(mine, np.uint64(factor))
        taken = np.flatnonzero(owner >= 0)
        number = np.empty(len(owner), dtype=np.int64)
        number[taken] = np.arange(known, known + len(taken))
        kind[pending] = number[slot]
        chosen.append(pending[owner[taken]])
        pending, known, factor = pending[~agrees], known + len(taken), factor * HASH_FACTOR % (1 << 64)
    return np.concatenate(chosen), kind


def _slots(code: NDArray[np.int64], factor: np.uint64) -> tuple[NDArray, NDArray, NDArray[np.bool_]]:
    """The slot of every row, the row that owns each slot (-1: none), and which rows have the code of their owner."""
    owner, held = np.full(1 << HASH_BITS, -1), np.empty(1 << HASH_BITS, dtype=np.int64)
    slot, agrees = np.empty(len(code), dtype=np.int64), np.empty(len(code), dtype=bool)
    for start in range(0, len(code), BLOCK):
        rows = slice(start, start + BLOCK)
        mine = code[rows]
        here = ((mine.view(np.uint64) * factor) >> np.uint64(64 - HASH_BITS)).view(np.int64)
        free = np.flatnonzero(owner[here] < 0)
        owner[here[free]] = start + free
        held[here[free]] = code[owner[here[free]]]
        slot[rows], agrees[rows] = here, held[here] == mine
    return slot, owner, agrees


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
    microbatches = table.microbatches(train.global_batch_size)
    inside_rows, inside = distinct([getattr(table, name) for name in INSIDE])
    pipe_rows, pipe = distinct([*(getattr(table, name) for name in PIPELINE), microbatches])
    pipelines = table.take(pipe_rows)
    found = [instants(pipeline_of(model, train, pipelines, row)) for row in range(len(pipelines))]
    price = prices(model, train, table.take(inside_rows), profile, imbalance).total
    both_rows, both = distinct([pipe, inside])
    activations = _per_group(
        pipe[both_rows], found, lambda rows, each: peak_activations(each, price[inside[both_rows[rows]]])
    )

    layouts: dict[tuple[bytes, bool], int] = {}
    layout = np.array([layouts.setdefault((each.holds.tobytes(), each.defers), len(layouts)) for each in found])[pipe]
    state_rows, state = distinct([layout, *(getattr(table, name) for name in STATES)])
    chosen = table.take(state_rows)
    states = _per_group(pipe[state_rows], found, lambda rows, each: _states(model, train, each, chosen.take(rows)))
    together = (held[both] + kept[state] for held, kept in zip(activations.T.copy(), states.T.copy(), strict=True))
    return functools.reduce(np.maximum, together)


def _per_group(
    group: NDArray, found: Sequence[Instants], evaluate: Callable[[NDArray, Instants], NDArray]
) -> NDArray[np.float64]:
    """`evaluate(rows, instants)`, (rows, classes), for the rows of every group; classes that are not there are -inf."""
    width = max(len(each.holds) for each in found)
    result = np.full((len(group), width), -np.inf)
    order = np.argsort(group, kind="stable")
    bounds = np.searchsorted(group[order], np.arange(len(found) + 1))
    for index, each in enumerate(found):
        rows = order[bounds[index] : bounds[index + 1]]
        if len(rows):
            result[rows, : len(each.holds)] = evaluate(rows, each)
    return result


def _states(model: ModelSpec, train: TrainConfig, found: Instants, table: StrategyTable) -> NDArray[np.float64]:
    """Bytes of weights, gradients and optimizer state, whole units included: (rows, classes)."""
    shapes, per_parameter = StageShapes(*found.holds.T), train.recipe.state
    held = state_bytes(state_elements(model, shapes, table), per_parameter)
    return sum(held.values()) + whole_unit_bytes(model, shapes, table, per_parameter, defers=found.defers)

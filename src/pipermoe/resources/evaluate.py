"""Many strategies at once: peak memory and a lower bound of the step, for a million rows in a fraction of a second.

Few of a million rows differ in what a formula reads: activations do not depend on ZeRO, states not on the schedule.
Each formula is evaluated for the rows that differ for it and gathered for all others. Memory is a sum of whole numbers
below 2^53 and so exact in any order: a row weighs the same alone as among others.
"""

from __future__ import annotations

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
LARGEST_LOOKUP = 1 << 22  # codes; beyond it a lookup table no longer fits a cache and codes are made dense first


def distinct(columns: Sequence[NDArray]) -> tuple[NDArray, NDArray]:
    """The rows that differ in `columns`: (index of one row of each kind, kind of every row)."""
    kinds, code = 1, np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, small = _dense(column)
        if kinds * values > LARGEST_LOOKUP:
            kinds, code = _dense(code)
        kinds, code = kinds * values, code * values + small
    kinds, code = _dense(code)
    first = np.empty(kinds, dtype=np.int64)
    first[code[::-1]] = np.arange(len(code) - 1, -1, -1)
    return first, code


def _dense(values: NDArray) -> tuple[int, NDArray]:
    """How many different values there are, and the rank of each entry's value among them."""
    least, most = int(values.min()), int(values.max())
    if most - least >= LARGEST_LOOKUP:
        different, code = np.unique(values, return_inverse=True)
        return len(different), code
    seen = np.zeros(most - least + 1, dtype=bool)
    seen[values - least] = True
    rank = np.cumsum(seen) - 1
    return int(rank[-1]) + 1, rank[values - least]


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
    found = [instants(pipeline_of(model, train, table, int(row))) for row in pipe_rows]
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
    return np.max(activations[both] + states[state], axis=1)


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

"""Peak memory of every rank: what is held between steps, and the largest instant of the schedule on top.

An instant is a row of whole numbers (`resources.instants`), a strategy a row of bytes (`Prices`): what an instant holds
is their product. The peak is the maximum over all instants of all ranks, not that of stage 0 by decree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.activations.ends import embedding_memory, head_memory, join_memory
from pipermoe.resources.activations.layers import dense_layer, moe_layer
from pipermoe.resources.activations.sizes import RUNTIME, MemoryProfile, Moment, Recompute, sizes_of
from pipermoe.resources.instants import Feature, Instants, Pipeline, instants
from pipermoe.resources.sharded_units import whole_unit_bytes
from pipermoe.resources.stages import StageShapes
from pipermoe.resources.states import StateElements, state_bytes
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.report import MemoryCategory
from pipermoe.specs.strategy_table import SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Prices:
    """Bytes per unit of every feature, (rows, features); `moments` are the instants of a work feature by category."""

    total: NDArray[np.float64]
    moments: dict[Feature, tuple[Moment, ...]]


def prices(
    model: ModelSpec,
    train: TrainConfig,
    table: StrategyTable,
    profile: MemoryProfile = RUNTIME,
    imbalance: Any = 1.0,
) -> Prices:
    """The bytes of every row. They depend on the micro-batch, the degrees inside a stage and on recomputation only."""
    sizes, recompute = sizes_of(model, train, table, profile, imbalance), Recompute.of(table)
    moe, dense = moe_layer(sizes, recompute), dense_layer(sizes, recompute)
    head, embedding, join = head_memory(sizes), embedding_memory(sizes), join_memory(sizes, recompute)
    zero, hidden = 0.0 * sizes.hidden, sizes.hidden
    moments = {
        Feature.FORWARD_MOE: (Moment(zero, zero, moe.forward),),
        Feature.FORWARD_DENSE: (Moment(zero, zero, dense.forward),),
        Feature.LOSS: (Moment(zero, zero, head.peak),),
        Feature.MOE_B: moe.moments,
        Feature.DENSE_B: dense.moments,
        Feature.MOE_I: moe.deferring,
        Feature.DENSE_I: dense.deferring,
    }
    each = {
        Feature.KEPT_MOE: moe.kept,
        Feature.KEPT_DENSE: dense.kept,
        Feature.KEPT_HEAD: head.kept,
        Feature.KEPT_EMBEDDING: embedding.kept,
        Feature.DEFERRED_MOE: moe.deferred,
        Feature.DEFERRED_DENSE: dense.deferred,
        Feature.DEFERRED_HEAD: head.deferred,
        Feature.DEFERRED_EMBEDDING: embedding.deferred,
        Feature.OUTPUT: hidden,
        Feature.GRADIENT: hidden,
        Feature.INCOMING: hidden,
        Feature.RECEIVED: zero,
        Feature.KEPT_JOIN: join.kept,
        Feature.DEFERRED_JOIN: join.deferred,
        **{feature: np.max([m.extra + zero for m in those], axis=0) for feature, those in moments.items()},
    }
    total = np.stack([np.broadcast_to(each[feature], zero.shape) for feature in Feature], axis=1)
    return Prices(total.astype(np.float64), moments)


def pipeline_of(model: ModelSpec, train: TrainConfig, table: StrategyTable, row: int = 0) -> Pipeline:
    """What the instants of a row depend on."""
    return Pipeline(
        SCHEDULE_NAMES[int(table.schedule[row])],
        int(table.pipeline_parallel[row]),
        int(table.virtual_stages[row]),
        int(table.microbatches(train.global_batch_size)[row]),
        tuple(model.is_moe(layer) for layer in range(model.num_layers)),
        table.splits[int(table.layer_split[row])],
        model.mtp_layers,
    )


def peak_activations(found: Instants, total: NDArray[np.float64]) -> NDArray[np.float64]:
    """The most bytes beside states on a rank of every class: (rows, classes). Exact, as all numbers are whole."""
    return np.maximum.reduceat(total @ found.features.T, found.starts, axis=1)


def rank_memory(
    model: ModelSpec,
    train: TrainConfig,
    table: StrategyTable,
    states: StateElements,
    profile: MemoryProfile = RUNTIME,
    imbalance: Any = 1.0,
) -> list[dict[MemoryCategory, int]]:
    """Bytes by category at the peak of every pipeline rank of a single strategy; their sum is the peak."""
    priced = prices(model, train, table, profile, imbalance)
    found = instants(pipeline_of(model, train, table), by_rank=True)
    held = {name: np.asarray(each)[0] for name, each in state_bytes(states, train.recipe.state).items()}
    shapes = StageShapes(*found.holds.T)
    [whole] = whole_unit_bytes(model, shapes, table, train.recipe.state, defers=found.defers)
    worst = []
    for rank in range(len(found.holds)):
        mine = found.features[found.owner == rank]
        split = _by_category(mine[int(np.argmax(mine @ priced.total[0]))], priced)
        split["communication"] += int(whole[rank])
        worst.append({name: int(each[rank]) for name, each in held.items()} | split)
    return worst


def _by_category(feature: NDArray[np.float64], priced: Prices) -> dict[MemoryCategory, int]:
    """The bytes of one instant of the first row by where they were born."""
    price = priced.total[0]

    def part(*features: Feature) -> float:
        return float(sum(feature[f] * price[f] for f in features))

    message = price[Feature.OUTPUT]
    received = feature[Feature.RECEIVED] * message
    kept = part(Feature.KEPT_MOE, Feature.KEPT_DENSE, Feature.KEPT_HEAD, Feature.KEPT_EMBEDDING, Feature.OUTPUT)
    kept += part(Feature.KEPT_JOIN)
    deferred = part(Feature.DEFERRED_JOIN) + part(
        Feature.DEFERRED_MOE, Feature.DEFERRED_DENSE, Feature.DEFERRED_HEAD, Feature.DEFERRED_EMBEDDING
    )
    [work] = [f for f in priced.moments if feature[f]]
    at = max(priced.moments[work], key=lambda moment: float(_first(moment.extra)))
    activations = kept - received + deferred - _first(at.freed)
    communication = received + part(Feature.INCOMING) + _first(at.communication)
    temporary = part(Feature.GRADIENT) + _first(at.temporary)
    if work in (Feature.FORWARD_MOE, Feature.FORWARD_DENSE):
        activations, temporary = activations + _first(at.temporary), part(Feature.GRADIENT)
    return {"activations": int(activations), "communication": int(communication), "temporary": int(temporary)}


def _first(value: Any) -> float:
    return float(np.ravel(value)[0])


def worst(memory: Sequence[dict[MemoryCategory, int]]) -> int:
    """The pipeline rank with the largest peak."""
    return max(range(len(memory)), key=lambda rank: sum(memory[rank].values()))

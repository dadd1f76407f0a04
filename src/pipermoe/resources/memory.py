"""Peak memory of every rank: what is held between steps, and the largest instant of the schedule on top.

An instant is a row of whole numbers (`resources.instants`), a strategy a row of bytes (`Prices`): what an instant holds
is their product. The peak is the maximum over all instants of all ranks, not that of stage 0 by decree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.activations.ends import embedding_memory, head_memory, join_memory
from pipermoe.resources.activations.layers import dense_layer, moe_layer
from pipermoe.resources.activations.ledger import BIRTHS, IN_ALL, Amount, BlockMemory, alone
from pipermoe.resources.activations.sizes import RUNTIME, MemoryProfile, Recompute, Sizes, sizes_of
from pipermoe.resources.instants import (
    DEFERRED,
    DEFERRING,
    FORWARD,
    FULL,
    KEPT,
    LEGS,
    WEIGHTS,
    Feature,
    Instants,
    Pipeline,
    instants,
)
from pipermoe.resources.kinds import distinct
from pipermoe.resources.sharded_units import shardings, unit_bytes
from pipermoe.resources.spare_slots import balancing_bytes
from pipermoe.resources.stages import StageShapes
from pipermoe.resources.states import StateElements, state_bytes, state_elements
from pipermoe.resources.turns import Part
from pipermoe.resources.whole_units import NOTHING_SHARDED, Sharded
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.report import MemoryCategory
from pipermoe.specs.strategy import RECOMPUTE_MODULES
from pipermoe.specs.strategy_table import SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

# What each part of a stage reads of a strategy.
ENDS = ("micro_batch_size", "context_parallel", "tensor_parallel")
JOIN = (*ENDS, "recompute")
LAYER = (*JOIN, "recompute_modules")
EXPERTS = (*LAYER, "expert_parallel", "expert_tensor_parallel", "dispatcher", "ranks_per_copy")


def prices(
    model: ModelSpec,
    train: TrainConfig,
    table: StrategyTable,
    profile: MemoryProfile = RUNTIME,
    imbalance: float = 1.0,
) -> NDArray[np.float64]:
    """Bytes per unit of every feature: (rows, features). They depend on the micro-batch, the degrees inside a stage and
    on recomputation only, most of them on fewer: each part is worked out for the rows that differ for it.
    """
    price = np.zeros((len(Feature), len(table)))
    for part, names, modules in _PARTS:
        rebuilt = table.recompute_modules & sum(1 << RECOMPUTE_MODULES.index(module) for module in modules)
        kinds = distinct([rebuilt if name == "recompute_modules" else getattr(table, name) for name in names])
        found = np.zeros((len(Feature), len(kinds.rows)))
        for rows in _by_script(table.columns["dispatcher"][kinds.rows], names):
            chosen = table.take(kinds.rows[rows])
            held = part(sizes_of(model, train, chosen, profile, imbalance, IN_ALL), Recompute.of(chosen))
            for feature, each in held.items():
                found[feature, rows] = each.total
        features = found.any(axis=1)
        price[features] = found[features].take(kinds.of, axis=1)
    return price.T


def _by_script(dispatcher: NDArray[np.integer], names: Sequence[str]) -> list[NDArray[np.int64]]:
    """Rows that follow the same script: of a part that reads it, those of one dispatcher."""
    if "dispatcher" not in names:
        return [np.arange(len(dispatcher))]
    return [np.flatnonzero(dispatcher == one) for one in np.unique(dispatcher)]


def _held(sizes: Sizes, recompute: Recompute) -> dict[Feature, Amount]:
    """What a unit of every feature holds."""
    return {feature: held for part, *_ in _PARTS for feature, held in part(sizes, recompute).items()}


def _of_ends(sizes: Sizes, _: Recompute) -> dict[Feature, Amount]:
    hidden, nothing = sizes.hidden, sizes.nothing
    kept, received = nothing.more(hidden, "activations"), nothing.more(hidden, "communication")
    return {
        Feature.OUTPUT: kept,
        Feature.GRADIENT: nothing.more(hidden, "temporary"),
        Feature.INCOMING: received,
        Feature.RECEIVED: received.more(-hidden, "activations"),
        Feature.STREAM: kept,
        **_of_block(Part.HEAD, head_memory(sizes)),
        **_of_block(Part.EMBEDDING, embedding_memory(sizes)),
    }


def _of_join(sizes: Sizes, recompute: Recompute) -> dict[Feature, Amount]:
    return _of_block(Part.JOIN, join_memory(sizes, recompute))


def _of_dense(sizes: Sizes, recompute: Recompute) -> dict[Feature, Amount]:
    return _of_block(Part.DENSE, dense_layer(sizes, recompute))


def _of_moe(sizes: Sizes, recompute: Recompute) -> dict[Feature, Amount]:
    moe = moe_layer(sizes, recompute)
    legs = (*moe.forward, *moe.deferring)
    attend, route, compute, _, split, compute_back, attend_back = legs
    return {
        **_of_block(Part.MOE, moe),
        **{feature: step.peak for feature, step in zip(LEGS, legs, strict=True)},
        Feature.AFTER_ATTEND: attend.held,
        Feature.AFTER_ROUTE: route.held,
        Feature.AFTER_COMPUTE: compute.held,
        Feature.AFTER_SPLIT: split.held,
        Feature.AFTER_COMPUTE_BACK: compute_back.held,
        Feature.DEFERRED_COMPUTE_BACK: compute_back.deferred,
        Feature.DEFERRED_ATTEND_BACK: attend_back.deferred,
    }


def _of_block(part: Part, block: BlockMemory) -> dict[Feature, Amount]:
    """What every part has: what stays of it, and its work when nothing comes between the steps."""
    return {
        KEPT[part]: block.kept,
        DEFERRED[part]: block.deferred,
        WEIGHTS[part]: block.product,
        FORWARD[part]: alone(block.forward),
        FULL[part]: alone(block.full),
        DEFERRING[part]: alone(block.deferring),
    }


_PARTS = (
    (_of_ends, ENDS, ()),
    (_of_join, JOIN, ()),
    (_of_dense, LAYER, ("norm", "attention", "dense_mlp")),
    (_of_moe, EXPERTS, ("norm", "attention", "moe_act", "experts", "shared_experts")),
)


def pipeline_of(
    model: ModelSpec, train: TrainConfig, table: StrategyTable, row: int = 0, sharded: Sharded = NOTHING_SHARDED
) -> Pipeline:
    """What the instants of a row depend on."""
    return Pipeline(
        SCHEDULE_NAMES[int(table.schedule[row])],
        int(table.pipeline_parallel[row]),
        int(table.virtual_stages[row]),
        int(table.microbatches(train.global_batch_size)[row]),
        tuple(model.is_moe(layer) for layer in range(model.num_layers)),
        table.splits[int(table.layer_split[row])],
        model.mtp_layers,
        sharded,
    )


def peak_activations(found: Instants, by_kind: NDArray[np.float64], kinds: NDArray[np.int64]) -> NDArray[np.float64]:
    """The most bytes beside states and whole units in every group of instants: (groups, rows). Exact: all is whole.

    `by_kind` are prices (kinds, features), of which instants use few, and `kinds` the kind of every row.
    """
    used = np.flatnonzero(found.features.any(axis=0))
    price = by_kind[:, used].take(kinds, axis=0)
    return np.maximum.reduceat(found.features[:, used] @ price.T, found.starts, axis=0)


def held_between_steps(
    model: ModelSpec, train: TrainConfig, shapes: StageShapes, table: StrategyTable
) -> NDArray[np.float64]:
    """Bytes of weights, gradients and optimizer state on every class of ranks: (rows, classes)."""
    held = state_bytes(state_elements(model, shapes, table), train.recipe.state)
    moving = balancing_bytes(model, train, table, shapes)
    return np.asarray(sum(held.values()) + sum(moving.values()), dtype=np.float64)


def rank_memory(
    model: ModelSpec,
    train: TrainConfig,
    table: StrategyTable,
    states: StateElements,
    profile: MemoryProfile = RUNTIME,
    imbalance: Any = 1.0,
) -> list[dict[MemoryCategory, int]]:
    """Bytes by category at the peak of every pipeline rank of a single strategy; their sum is the peak."""
    priced = _held(sizes_of(model, train, table, profile, imbalance), Recompute.of(table))
    births = np.array([[np.ravel(getattr(priced[feature], birth))[0] for feature in Feature] for birth in BIRTHS])
    found = instants(pipeline_of(model, train, table, sharded=shardings(table).each[0]), by_rank=True)
    held = {name: np.asarray(each)[0] for name, each in state_bytes(states, train.recipe.state).items()}
    shapes = StageShapes(*found.holds.T)
    moving = {name: np.asarray(each)[0] for name, each in balancing_bytes(model, train, table, shapes).items()}
    held = {name: each + moving[name] for name, each in held.items()}
    whole = found.whole @ unit_bytes(model, table, train.recipe.state)[0]
    group = np.repeat(np.arange(len(found.starts)), np.diff([*found.starts, len(found.features)]))
    together = births @ found.features.T
    total = together.sum(axis=0) + whole[group]
    worst = []
    for rank in range(len(found.holds)):
        mine = np.flatnonzero(found.owner[group] == rank)
        most = mine[np.argmax(total[mine])]
        split = dict(zip(BIRTHS, together[:, most], strict=True))
        split["communication"] += whole[group[most]] + moving["communication"][rank]
        worst.append({name: int(each[rank]) for name, each in held.items()} | {n: int(b) for n, b in split.items()})
    return worst


def worst(memory: Sequence[dict[MemoryCategory, int]]) -> int:
    """The pipeline rank with the largest peak."""
    return max(range(len(memory)), key=lambda rank: sum(memory[rank].values()))

"""Parameters, gradients and optimizer state that a rank holds: elements and bytes, array (rows, stages or ranks).

Dense parameters are divided over tp and shared by the dp * cp ranks of a group, routed experts are divided over ep and
etp and shared by edp ranks; each lie in one flat buffer padded to a multiple of its group
(`runtime/optimizer/flat_parameters.py`). ZeRO: Rajbhandari et al. 2020, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipermoe.resources.parameters import final_norm_parameters, layer_spread
from pipermoe.resources.stages import StageShapes
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.precision import StateBytes
from pipermoe.specs.report import MemoryCategory
from pipermoe.specs.strategy_table import StrategyTable


@dataclass(frozen=True, slots=True)
class StateElements:
    """Elements on one rank of every stage. `dense` and `expert` are the whole (padded) buffers of its parameters.

    `weights`, `gradients` and `updated` (master and moments) are what the rank keeps of both under its ZeRO levels;
    `owned` is the slice whose part of the gradient norm it counts.
    """

    dense: Any
    expert: Any
    weights: Any
    gradients: Any
    updated: Any
    owned: Any

    @property
    def held(self) -> Any:
        return self.dense + self.expert


def state_elements(model: ModelSpec, shapes: StageShapes, table: StrategyTable) -> StateElements:
    """Elements on one rank for every row of a table and every column of `shapes`."""
    copies = (table.data_parallel * table.context_parallel)[:, None], table.expert_data_parallel[:, None]
    shards = tuple(-(-whole // n) for whole, n in zip(held_parameters(model, shapes, table), copies, strict=True))
    wholes = tuple(shard * n for shard, n in zip(shards, copies, strict=True))
    levels = table.zero_dense[:, None], table.zero_expert[:, None]

    def kept(sharded_from: int) -> Any:
        parts = zip(levels, shards, wholes, strict=True)
        return sum(np.where(level >= sharded_from, shard, whole) for level, shard, whole in parts)

    return StateElements(
        dense=wholes[0],
        expert=wholes[1],
        weights=kept(3),
        gradients=kept(2),
        updated=kept(1),
        owned=shards[0] + shards[1],
    )


def held_parameters(model: ModelSpec, shapes: StageShapes, table: StrategyTable) -> tuple[Any, Any]:
    """Dense and routed-expert parameters of one rank before ZeRO; the vocabulary is padded to a multiple of tp."""
    tp, ep, etp = (
        degree[:, None] for degree in (table.tensor_parallel, table.expert_parallel, table.expert_tensor_parallel)
    )
    vocabulary = -(-model.vocab_size // tp)
    head = vocabulary * ((not model.tie_word_embeddings) * model.hidden_size + model.head_bias)
    if model.tie_word_embeddings:  # a rank with the head alone holds a copy of the embedding
        head = head + vocabulary * model.hidden_size * (1 - shapes.has_embedding)
    dense = shapes.has_embedding * vocabulary * model.hidden_size
    dense = dense + shapes.has_head * (head + final_norm_parameters(model))
    expert = np.zeros_like(dense)
    for is_moe, layers in ((True, shapes.moe_layers), (False, shapes.dense_layers)):
        spread = layer_spread(model, is_moe=is_moe)
        dense = dense + layers * (spread.dense // tp + spread.dense_replicated)
        expert = expert + layers * (spread.expert // (ep * etp) + spread.expert_replicated // ep)
    return dense, expert


def state_bytes(elements: StateElements, per_parameter: StateBytes) -> dict[MemoryCategory, Any]:
    """Bytes of weights, gradients and optimizer state (master copy and moments)."""
    return {
        "weights": elements.weights * per_parameter.weight,
        "gradients": elements.gradients * per_parameter.gradient,
        "optimizer": elements.updated * per_parameter.optimizer,
    }

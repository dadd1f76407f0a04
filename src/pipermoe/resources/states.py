"""Parameters, gradients and optimizer state that a rank holds: elements and bytes, array (rows, stages or ranks).

Dense parameters are divided over tp and shared by `dense_replicas` ranks, routed experts are divided over ep and etp
and shared by `expert_replicas`; those of each layer, embedding and head lie in a flat buffer padded to a multiple of
its group (`runtime/optimizer/flat_parameters.py`).
ZeRO: Rajbhandari et al. 2020, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipermoe.resources.parameters import final_norm_parameters, join_parameters, layer_spread
from pipermoe.resources.stages import StageShapes
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.precision import StateBytes
from pipermoe.specs.report import MemoryCategory
from pipermoe.specs.strategy_table import StrategyTable


@dataclass(frozen=True, slots=True)
class StateElements:
    """Elements on one rank of every stage. `dense` and `expert` are the whole (padded) buffers of its parameters.

    `weights`, `gradients` and `updated` (master and moments) are what the rank keeps of both under its ZeRO levels;
    `owned` is the slice whose part of the gradient norm it counts. `copied` is the whole buffer of an embedding that
    both ends of the pipeline hold. A forward, or a backward, comes to `uses` dense buffers of `used` elements in all,
    each of which sharding makes whole for that use; what it comes to twice counts twice.
    """

    dense: Any
    expert: Any
    weights: Any
    gradients: Any
    updated: Any
    owned: Any
    copied: Any
    uses: Any
    used: Any

    @property
    def held(self) -> Any:
        return self.dense + self.expert


@dataclass(frozen=True, slots=True)
class Units:
    """Parameters of what is sharded as one, before sharding: (rows, 1). `experts` are one layer's on a rank."""

    embedding: Any
    head: Any
    moe_layer: Any
    dense_layer: Any
    prediction: Any
    experts: Any

    def padded(self, dense_copies: Any, expert_copies: Any) -> Units:
        """Each as a flat buffer of its own, a multiple of the ranks that share it."""

        def up(whole: Any, copies: Any) -> Any:
            return -(-whole // copies) * copies

        return Units(
            up(self.embedding, dense_copies),
            up(self.head, dense_copies),
            up(self.moe_layer, dense_copies),
            up(self.dense_layer, dense_copies),
            up(self.prediction, dense_copies),
            up(self.experts, expert_copies),
        )

    def on(self, shapes: StageShapes, *, copied: bool) -> tuple[Any, Any]:
        """Dense and expert elements of every column of `shapes`; a head without embedding may hold a copy of it."""
        embeddings = np.maximum(shapes.has_embedding, shapes.has_head) if copied else shapes.has_embedding
        dense = embeddings * self.embedding + shapes.has_head * self.head
        dense = dense + shapes.moe_layers * self.moe_layer + shapes.dense_layers * self.dense_layer
        return dense + shapes.predictions * self.prediction, shapes.routed_layers * self.experts

    def uses(self, shapes: StageShapes, *, tied: bool) -> tuple[Any, Any]:
        """How many dense buffers a forward, or a backward, uses, and their elements.

        Every depth of multi-token prediction comes back to head and embedding; a tied head uses the embedding as well.
        """
        heads = shapes.has_head + shapes.predictions
        embeddings = shapes.has_embedding + shapes.predictions + tied * heads
        layers = shapes.moe_layers * self.moe_layer + shapes.dense_layers * self.dense_layer
        elements = embeddings * self.embedding + heads * self.head + layers + shapes.predictions * self.prediction
        return embeddings + heads + shapes.routed_layers + shapes.dense_layers, elements


def state_elements(model: ModelSpec, shapes: StageShapes, table: StrategyTable) -> StateElements:
    """Elements on one rank for every row of a table and every column of `shapes`."""
    copies = table.dense_replicas[:, None], table.expert_replicas[:, None]
    levels = table.zero_dense[:, None], table.zero_expert[:, None]
    padded = units_of(model, table).padded(*copies)
    wholes = padded.on(shapes, copied=model.embeds_twice)
    shards = tuple(whole // n for whole, n in zip(wholes, copies, strict=True))
    uses, used = padded.uses(shapes, tied=model.tie_word_embeddings)
    at_one_end = np.abs(shapes.has_embedding - shapes.has_head) * model.embeds_twice

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
        copied=at_one_end * padded.embedding,
        uses=uses,
        used=used,
    )


def units_of(model: ModelSpec, table: StrategyTable) -> Units:
    """The units of every row; the vocabulary is padded to a multiple of tp."""
    tp, ep, etp = (
        degree[:, None] for degree in (table.tensor_parallel, table.expert_parallel, table.expert_tensor_parallel)
    )
    vocabulary = -(-model.vocab_size // tp)
    head = vocabulary * ((not model.tie_word_embeddings) * model.hidden_size + model.head_bias)
    moe, dense = layer_spread(model, is_moe=True), layer_spread(model, is_moe=False)
    divided, replicated = join_parameters(model)
    return Units(
        embedding=vocabulary * model.hidden_size,
        head=head + final_norm_parameters(model),
        moe_layer=moe.dense // tp + moe.dense_replicated,
        dense_layer=dense.dense // tp + dense.dense_replicated,
        prediction=moe.dense // tp + moe.dense_replicated + divided // tp + replicated,
        experts=moe.expert // (ep * etp) + moe.expert_replicated // ep,
    )


def state_bytes(elements: StateElements, per_parameter: StateBytes) -> dict[MemoryCategory, Any]:
    """Bytes of weights, gradients and optimizer state (master copy and moments)."""
    return {
        "weights": elements.weights * per_parameter.weight,
        "gradients": elements.gradients * per_parameter.gradient,
        "optimizer": elements.updated * per_parameter.optimizer,
    }

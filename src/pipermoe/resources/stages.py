"""What each pipeline stage holds: its layers, embedding, head, and their parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.parameters import (
    embedding_parameters,
    final_norm_parameters,
    head_parameters,
    layer_parameters,
)
from pipermoe.specs.mesh import split_layers
from pipermoe.specs.model import ModelSpec


@dataclass(frozen=True, slots=True)
class StageShapes:
    """One int64 entry per stage, in stage order."""

    moe_layers: NDArray
    dense_layers: NDArray
    has_embedding: NDArray
    has_head: NDArray
    dense_parameters: NDArray  # everything but the routed experts
    expert_parameters: NDArray  # all routed experts of the stage, before expert parallelism divides them

    @property
    def num_stages(self) -> int:
        return len(self.moe_layers)


def stage_shapes(model: ModelSpec, num_stages: int, layer_split: tuple[int, ...] = ()) -> StageShapes:
    """The stages of `model` cut into `num_stages` by `layer_split` (empty: as even as can be)."""
    ranges = split_layers(model.num_layers, num_stages, layer_split)
    first, last = np.arange(num_stages) == 0, np.arange(num_stages) == num_stages - 1
    layers = [[layer_parameters(model, layer) for layer in stage] for stage in ranges]
    dense = np.array([sum(layer.dense for layer in stage) for stage in layers], dtype=np.int64)
    return StageShapes(
        moe_layers=np.array([sum(model.is_moe(layer) for layer in stage) for stage in ranges]),
        dense_layers=np.array([sum(not model.is_moe(layer) for layer in stage) for stage in ranges]),
        has_embedding=first.astype(np.int64),
        has_head=last.astype(np.int64),
        dense_parameters=dense
        + first * embedding_parameters(model)
        + last * (head_parameters(model) + final_norm_parameters(model)),
        expert_parameters=np.array([sum(layer.routed_experts for layer in stage) for stage in layers], dtype=np.int64),
    )

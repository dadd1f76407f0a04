"""What each pipeline stage or rank holds: how many layers of either kind, and whether embedding or head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.mesh import split_layers
from pipermoe.specs.model import ModelSpec


@dataclass(frozen=True, slots=True)
class StageShapes:
    """One int64 entry per stage, or per rank of several stages."""

    moe_layers: NDArray
    dense_layers: NDArray
    has_embedding: NDArray
    has_head: NDArray
    predictions: NDArray  # layers of multi-token prediction, each with the passes through embedding and head before it

    @property
    def routed_layers(self) -> NDArray:
        """The layers with experts, those of multi-token prediction included."""
        return self.moe_layers + self.predictions

    @property
    def num_stages(self) -> int:
        return len(self.moe_layers)

    def of_ranks(self, stages_of: Sequence[Sequence[int]]) -> StageShapes:
        """The sums over the stages of every rank."""
        return StageShapes(*(np.array([sum(getattr(self, f.name)[list(s)]) for s in stages_of]) for f in fields(self)))


def stage_shapes(model: ModelSpec, num_stages: int, layer_split: tuple[int, ...] = ()) -> StageShapes:
    """The stages of `model` cut into `num_stages` by `layer_split` (empty: as even as can be)."""
    ranges = split_layers(model.num_layers, num_stages, layer_split)
    stage = np.arange(num_stages)
    return StageShapes(
        moe_layers=np.array([sum(model.is_moe(layer) for layer in layers) for layers in ranges]),
        dense_layers=np.array([sum(not model.is_moe(layer) for layer in layers) for layers in ranges]),
        has_embedding=(stage == 0).astype(np.int64),
        has_head=(stage == num_stages - 1).astype(np.int64),
        predictions=(stage == num_stages - 1) * model.mtp_layers,
    )


ONE_OF_EACH = StageShapes(*np.eye(len(fields(StageShapes)), dtype=np.int64))  # a stage of every kind of part

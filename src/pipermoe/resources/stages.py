"""What each pipeline stage or rank holds: how many layers of either kind, and whether embedding or head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

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
    layers = tuple(map(model.is_moe, range(model.num_layers)))
    return shapes_of(layers, model.mtp_layers, num_stages, layer_split)


def shapes_of(
    layers: Sequence[bool], predictions: int, num_stages: int, layer_split: tuple[int, ...] = ()
) -> StageShapes:
    """The same of any layers; `layers[i]` says whether layer i has experts."""
    ranges = split_layers(len(layers), num_stages, layer_split)
    stage = np.arange(num_stages)
    return StageShapes(
        moe_layers=np.array([sum(layers[layer] for layer in each) for each in ranges]),
        dense_layers=np.array([sum(not layers[layer] for layer in each) for each in ranges]),
        has_embedding=(stage == 0).astype(np.int64),
        has_head=(stage == num_stages - 1).astype(np.int64),
        predictions=(stage == num_stages - 1) * predictions,
    )


ONE_OF_EACH = StageShapes(*np.eye(len(fields(StageShapes)), dtype=np.int64))  # a stage of every kind of part


@lru_cache(maxsize=8192)
def rank_classes(
    stages_of: tuple[tuple[int, ...], ...], parts: tuple[tuple[int, ...], ...]
) -> tuple[NDArray, NDArray, NDArray]:
    """Ranks that hold equal parts are one class: what the classes hold (classes, parts), the class of each rank, and
    how many ranks each class has. Stage s holds `parts[s]`.
    """
    held = np.array(parts, dtype=np.int64)[np.array(stages_of)].sum(axis=1)
    holds, class_of, alike = np.unique(held, axis=0, return_inverse=True, return_counts=True)
    return holds, class_of.ravel(), alike

"""The whole buffers that ZeRO-2 and 3 fill while a unit (a layer, embedding or head) is in work: elements on a rank.

A unit's gradients are whole while a backward fills them, and those of the unit before are on their way to their
shards; level 3 also gathers the weights of the unit in work and of the next one (`runtime/optimizer/sharding.py`). A
rank holds most when a backward reaches its last layer. So the units are taken to be: of weights two layers, or one and
the head; of gradients that layer (with experts, if the rank has any) and what was reduced before it: the head, or where
there is none the embedding, or a layer. With experts alone sharded it is always a layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.stages import ONE_OF_EACH, StageShapes
from pipermoe.resources.states import units_of
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.precision import StateBytes
from pipermoe.specs.strategy_table import StrategyTable

RESIDENT = 2  # units that are whole at the same time


def whole_unit_bytes(
    model: ModelSpec, shapes: StageShapes, table: StrategyTable, per_parameter: StateBytes, *, defers: bool
) -> NDArray[np.float64]:
    """Bytes of gathered weights and of open gradients on the ranks of `shapes`: (rows, ranks).

    `defers`: the schedule has I and W actions. A W holds little else, so at the peak, in an I, no gradients are being
    filled; the last that were may still be on their way.
    """
    gathered = _units(model, table, from_level=3) * per_parameter.weight
    filled = _units(model, table, from_level=2) * per_parameter.gradient
    moe, dense, embedding, head = shapes.moe_layers, shapes.dense_layers, shapes.has_embedding, shapes.has_head
    ahead = (shapes.predictions > 0).astype(np.int64)  # then the last layer is one of multi-token prediction
    others = (moe, dense, embedding * (moe + dense + head == 1))
    in_use = np.stack((*(each * (1 - ahead) for each in others), head, ahead))
    layers = (2 - np.maximum(embedding, head)) * (1 - ahead)
    reduced = np.stack((layers * (moe > 0), layers * (moe == 0), np.maximum(embedding - head, 0), head, ahead))
    # Where only experts are sharded, neither end is reduced between two layers.
    ends_reduce = ((table.zero_dense >= 2) & (table.data_parallel * table.context_parallel > 1))[:, None]
    only_layers = np.stack((moe, dense, 0 * moe, 0 * moe, shapes.predictions))
    most = RESIDENT - defers
    open_gradients = np.where(ends_reduce, _largest(filled, reduced, most), _largest(filled, only_layers, most))
    return _largest(gathered, in_use, RESIDENT) + open_gradients


def _units(model: ModelSpec, table: StrategyTable, from_level: int) -> Any:
    """Elements of a unit of each kind that are sharded from `from_level` on: (rows, 5)."""
    dense, expert = units_of(model, table).on(ONE_OF_EACH, copied=model.tie_word_embeddings)
    shards_dense = (table.zero_dense >= from_level) & (table.data_parallel * table.context_parallel > 1)
    shards_expert = (table.zero_expert >= from_level) & (table.expert_data_parallel > 1)
    return dense * shards_dense[:, None] + expert * shards_expert[:, None]


def _largest(units: Any, counts: NDArray[np.int64], most: int) -> NDArray[np.float64]:
    """The sum of the `most` largest units of a rank that has `counts` (5, ranks) of each kind: (rows, ranks)."""
    copies = np.concatenate([units[:, :, None] * (counts > copy) for copy in range(most)], axis=1)
    return np.sort(copies, axis=1)[:, -most:].sum(axis=1).astype(np.float64)

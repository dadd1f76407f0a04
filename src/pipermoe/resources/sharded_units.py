"""The bytes of the whole buffers that ZeRO-2 and 3 fill while a unit (a layer, embedding or head) is in work.

Which units are whole when is the business of `resources.whole_units`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.kinds import distinct
from pipermoe.resources.stages import ONE_OF_EACH, StageShapes
from pipermoe.resources.states import units_of
from pipermoe.resources.whole_units import RESIDENT, Sharded, UnitKind
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.precision import StateBytes
from pipermoe.specs.strategy_table import StrategyTable

NONE, EXPERTS, ALL = frozenset[UnitKind](), frozenset((UnitKind.MOE, UnitKind.PREDICTION)), frozenset(UnitKind)
_BY_CODE = (NONE, EXPERTS, ALL, ALL)  # whether experts are, plus twice whether dense parameters are


class Shardings(NamedTuple):
    """`each[of[i]]` is what row i shards."""

    each: list[Sharded]
    of: NDArray[np.int64]


def shardings(table: StrategyTable) -> Shardings:
    """The units that are whole for every use alone, of every row."""
    codes = []
    for level in (3, 2):
        dense, expert = _sharded_from(level, table)
        codes.append(expert + 2 * dense)
    kinds = distinct(codes)
    weights, gradients = (code[kinds.rows].tolist() for code in codes)
    return Shardings([Sharded(_BY_CODE[w], _BY_CODE[g]) for w, g in zip(weights, gradients, strict=True)], kinds.of)


def unit_bytes(model: ModelSpec, table: StrategyTable, per_parameter: StateBytes) -> NDArray[np.float64]:
    """Bytes of the whole weights, then of the whole gradients, of a unit of every kind: (rows, 2 * len(UnitKind)).

    Only of what is sharded; a tied head uses the embedding.
    """
    dense, expert = units_of(model, table).on(ONE_OF_EACH, copied=model.tie_word_embeddings)
    found = []
    for level, each in ((3, per_parameter.weight), (2, per_parameter.gradient)):
        of_dense, of_expert = (mask[:, None] for mask in _sharded_from(level, table))
        found.append((dense * of_dense + expert * of_expert) * each)
    return np.concatenate(found, axis=1).astype(np.float64)


def least_whole_bytes(
    model: ModelSpec, shapes: StageShapes, table: StrategyTable, per_parameter: StateBytes
) -> NDArray[np.float64]:
    """What the ranks of `shapes` hold of it at least while they use weights: the two smallest units, (rows, ranks)."""
    units = unit_bytes(model, table, per_parameter)
    counts = (shapes.moe_layers, shapes.dense_layers, shapes.has_embedding, shapes.has_head, shapes.predictions)
    least = following = np.inf
    for kind, count in zip(UnitKind, counts, strict=True):
        unit = units[:, kind, None]
        for copy in range(RESIDENT):
            size = np.where((count > copy) & (unit > 0), unit, np.inf)
            least, following = np.minimum(least, size), np.minimum(following, np.maximum(least, size))
    return np.where(np.isfinite(least), least, 0.0) + np.where(np.isfinite(following), following, 0.0)


def _sharded_from(level: int, table: StrategyTable) -> tuple[Any, Any]:
    """Whether dense and expert parameters are sharded at this ZeRO level: (rows,) each."""
    dense = (table.zero_dense >= level) & (table.dense_replicas > 1)
    return dense, (table.zero_expert >= level) & (table.expert_replicas > 1)

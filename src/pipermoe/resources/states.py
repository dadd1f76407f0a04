"""Parameters, gradients and optimizer state that a rank holds: elements per rank, array (rows, stages).

Dense parameters are shared over dp and routed experts over edp, each laid in one flat buffer padded to a multiple
of its group (`runtime/flat_parameters.py`). ZeRO: Rajbhandari et al. 2020, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipermoe.resources.stages import StageShapes
from pipermoe.specs.strategy_table import StrategyTable

MOMENTS = 2  # AdamW's running means of the gradient and of its square, fp32
MOMENT_BYTES = 4


@dataclass(frozen=True, slots=True)
class StateElements:
    """Elements on one rank of every stage: held (weights, and as many gradients), updated and owned by it."""

    dense: Any
    expert: Any
    updated: Any
    owned: Any

    @property
    def held(self) -> Any:
        return self.dense + self.expert


def state_elements(shapes: StageShapes, table: StrategyTable) -> StateElements:
    """`updated` is what a rank's optimizer updates and keeps moments for; `owned` the slice whose norm it counts."""
    dp, edp = table.data_parallel[:, None], table.expert_data_parallel[:, None]
    zero_dense, zero_expert = table.zero_dense[:, None] > 0, table.zero_expert[:, None] > 0
    dense_shard = -(-shapes.dense_parameters // dp)
    expert_shard = -(-(shapes.expert_parameters // table.expert_parallel[:, None]) // edp)
    return StateElements(
        dense=dense_shard * dp,
        expert=expert_shard * edp,
        updated=dense_shard * (zero_dense + ~zero_dense * dp) + expert_shard * (zero_expert + ~zero_expert * edp),
        owned=dense_shard + expert_shard,
    )

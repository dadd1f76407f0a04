"""How the ranks of a group lie among all ranks, which decides on what levels of a network they meet.

The groups of specs/mesh.py for many strategies at once, without listing a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipermoe.specs.strategy_table import StrategyTable

Axis = Literal["tp", "cp", "etp", "ep", "ep_across", "ep_inside", "dp", "edp", "pp", "ends", "world"]


@dataclass(frozen=True, slots=True)
class Spread:
    """A group of `runs` times `near` ranks: each run evenly over `reach` consecutive ranks, a run every `apart` ranks.

    All broadcast.
    """

    near: Any
    reach: Any
    runs: Any = 1
    apart: Any = 1

    @property
    def ranks(self) -> Any:
        return self.near * self.runs

    @property
    def span(self) -> Any:
        """Over how many consecutive ranks the group is spread."""
        return np.where(np.asarray(self.runs) > 1, self.runs * self.apart, self.reach)

    def inside(self, block: int) -> Any:
        """How many of the group share a block of so many consecutive ranks, at least 1."""
        return np.clip(self.near * (block / self.reach), 1, self.near) * np.clip(block / self.apart, 1, self.runs)


def spread(table: StrategyTable, axis: Axis) -> Spread:
    """The groups of every row along `axis`; "dp" is dp and cp together: the ranks with the same dense parameters."""
    tp, etp, block = table.tensor_parallel, table.expert_tensor_parallel, table.ranks_per_copy
    experts = table.expert_parallel * etp
    match axis:
        case "tp":
            return Spread(tp, tp)
        case "cp":
            return Spread(table.context_parallel, table.context_parallel * tp)
        case "etp":
            return Spread(etp, etp)
        case "ep":
            return Spread(table.expert_parallel, experts)
        case "ep_across":
            return Spread(table.expert_parallel // block, experts)
        case "ep_inside":
            return Spread(block, block * etp)
        case "world":
            return Spread(table.world_size, table.world_size)
    stride = table.stage_stride
    pipeline, homes = table.pipeline_parallel * stride, table.stage_homes  # two lie half a pipeline apart on average
    match axis:
        case "dp":
            return Spread(stride // tp, stride, table.runs_per_stage * homes, pipeline // homes)
        case "edp":
            return Spread(stride // experts, stride, table.runs_per_stage * homes, pipeline // homes)
        case "pp":
            return Spread(table.pipeline_parallel, pipeline)
        case "ends":
            return Spread(2, pipeline)

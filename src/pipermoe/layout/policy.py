"""Policy: from a layout and a forecast of the load to the next layout."""

# L MoE layers, E logical experts, N ranks

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout


@dataclass(frozen=True, slots=True)
class Nodes:
    """The ranks of an expert-parallel group on their nodes: rank n is on node n // ranks_per_node."""

    ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.ranks % self.ranks_per_node:
            raise ValueError(f"{self.ranks} ranks are no whole number of nodes of {self.ranks_per_node} ranks")

    @property
    def count(self) -> int:
        return self.ranks // self.ranks_per_node

    @property
    def node_N(self) -> NDArray[np.int64]:
        """The node of every rank."""
        return np.arange(self.ranks) // self.ranks_per_node


class Policy(Protocol):
    """A way to choose layouts. It is a pure function: the same integers give the same layout on every rank."""

    def plan(self, layout: ExpertLayout, load_LE: NDArray[np.int64], nodes: Nodes) -> ExpertLayout:
        """The next layout for the forecast `load_LE` (rows of each expert), with as many ranks and slots as `layout`.

        A policy that finds nothing better returns `layout` itself.
        """
        ...

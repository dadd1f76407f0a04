"""DeepSeek's expert-parallel load balancer (EPLB), as a baseline: after the description in its repository's README.

Global: the redundant slots one by one to the expert whose copies are the largest; then copies longest first onto ranks
of equal numbers of slots. Hierarchical: groups of experts onto nodes first, then the same inside each node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.grouping import group_by_load
from pipermoe.layout.packing import items_of, longest_first, pack_in_nodes
from pipermoe.layout.policy import Nodes
from pipermoe.layout.replicas import greedy_copies


@dataclass(frozen=True, slots=True)
class Eplb:
    """`groups` of consecutive experts stay on one node (group-limited routing); 1 is the global variant."""

    groups: int = 1

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        _, ranks, slots = layout.shape
        if self.groups == 1 or nodes.count == 1:
            copies_LE = greedy_copies(load_LE, ranks * slots)
            return layout.successor(longest_first(items_of(copies_LE), load_LE / copies_LE, ranks, slots))
        if self.groups % nodes.count or layout.num_experts % self.groups:
            raise ValueError(
                f"groups = {self.groups} must be a multiple of the {nodes.count} nodes and divide the "
                f"{layout.num_experts} experts"
            )
        return layout.successor(pack_in_nodes(self._nodes_of_experts(load_LE, nodes), load_LE, nodes, slots))

    def _nodes_of_experts(self, load_LE: NDArray, nodes: Nodes) -> NDArray[np.int64]:
        """The node of every expert, (L, E): groups longest first onto nodes with equal numbers of groups."""
        layers, experts = load_LE.shape
        load = load_LE.reshape(layers, self.groups, -1).sum(2)
        return np.repeat(group_by_load(load, nodes.count), experts // self.groups, axis=1)

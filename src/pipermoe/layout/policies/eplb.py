"""DeepSeek's expert-parallel load balancer (EPLB), as a baseline: after the description in its repository's README.

Global: the redundant slots one by one to the expert whose copies are the largest; then copies longest first onto ranks
of equal numbers of slots. Hierarchical: groups of experts onto nodes first, then the same inside each node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.packing import items_of, longest_first
from pipermoe.layout.policy import Nodes
from pipermoe.layout.replicas import greedy_copies


@dataclass(frozen=True, slots=True)
class Eplb:
    """`groups` of consecutive experts stay on one node (group-limited routing); 1 is the global variant."""

    groups: int = 1

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        layers, ranks, slots = layout.shape
        if self.groups == 1 or nodes.count == 1:
            copies_LE = greedy_copies(load_LE, ranks * slots)
            return layout.successor(longest_first(items_of(copies_LE), load_LE / copies_LE, ranks, slots))
        if self.groups % nodes.count or layout.num_experts % self.groups:
            raise ValueError(
                f"groups = {self.groups} must be a multiple of the {nodes.count} nodes and divide the "
                f"{layout.num_experts} experts"
            )
        node_LE = self._nodes_of_experts(load_LE, nodes)
        slots_LNS = np.empty_like(layout.slots_LNS)
        held = layout.num_experts // nodes.count
        for node in range(nodes.count):
            experts_LI = np.nonzero(node_LE == node)[1].reshape(layers, held)
            here = slice(node * nodes.ranks_per_node, (node + 1) * nodes.ranks_per_node)
            load = np.take_along_axis(load_LE, experts_LI, axis=1)
            copies = greedy_copies(load, nodes.ranks_per_node * slots)
            local = longest_first(items_of(copies), load / copies, nodes.ranks_per_node, slots)
            slots_LNS[:, here] = np.take_along_axis(experts_LI[:, None], local, axis=2)
        return layout.successor(slots_LNS)

    def _nodes_of_experts(self, load_LE: NDArray, nodes: Nodes) -> NDArray[np.int64]:
        """The node of every expert, (L, E): groups longest first onto nodes with equal numbers of groups."""
        layers, experts = load_LE.shape
        load = load_LE.reshape(layers, self.groups, -1).sum(2).astype(float)
        order = np.tile(np.arange(self.groups), (layers, 1))
        placed = longest_first(order, load, nodes.count, self.groups // nodes.count)
        node = np.zeros((layers, self.groups), dtype=np.int64)
        np.put_along_axis(node, placed.reshape(layers, -1), np.repeat(np.arange(nodes.count), placed.shape[2])[None], 1)
        return np.repeat(node, experts // self.groups, axis=1)

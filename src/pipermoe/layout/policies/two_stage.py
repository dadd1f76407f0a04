"""MoETuner (arXiv 2502.06643): even clusters of experts by one integer program, their ranks by another. Offline."""

# L MoE layers, E logical experts, N ranks, S slots of a rank, T tokens, K choices of a token

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.exact import LIMITS, Limits, assign_clusters, assign_experts
from pipermoe.layout.expert_layout import ExpertLayout, slots_of
from pipermoe.layout.packing import longest_first
from pipermoe.layout.policy import Nodes


@dataclass(frozen=True, slots=True, eq=False)
class TwoStage:
    """One copy of each expert. Without `routes_TLK`, the experts that tokens chose, only the first program is solved.

    The ranks are chosen layer after layer, where the paper solves all in one. A unit that changes its node costs `far`
    times one that changes its rank. The flows of the second program matter only where tokens stay with their experts
    from layer to layer; where they return home after each, as in most systems, only the first counts.
    """

    routes_TLK: NDArray[np.int64] | None = None
    far: float = 8.0
    limits: Limits = LIMITS

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        _, ranks, slots = layout.shape
        cluster_LE = [self._clusters(load_E, ranks, slots) for load_E in load_LE]
        rank_LE = [cluster_LE[0]]
        for layer, cluster_E in enumerate(cluster_LE[1:], start=1):
            rank_LE.append(self._ranks_of(cluster_E, rank_LE[-1], layer, nodes)[cluster_E])
        held = [[np.flatnonzero(rank_E == rank) for rank in range(ranks)] for rank_E in rank_LE]
        return layout.successor(np.stack([slots_of(held_N, slots) for held_N in held]))

    def _clusters(self, load_E: NDArray, ranks: int, slots: int) -> NDArray[np.int64]:
        found = assign_experts(load_E, ranks, slots, objective="deviation", limits=self.limits).rank_E
        if found is not None:
            return found
        packed_NS = longest_first(np.arange(len(load_E))[None], load_E[None], ranks, slots)[0]
        return np.array([np.argwhere(packed_NS == expert)[0, 0] for expert in range(len(load_E))])

    def _ranks_of(
        self, cluster_E: NDArray[np.int64], before_E: NDArray[np.int64], layer: int, nodes: Nodes
    ) -> NDArray[np.int64]:
        """The rank of every cluster of `layer`, given the ranks of the experts of the layer before."""
        if self.routes_TLK is None:
            return np.arange(nodes.ranks)
        flow_NC = np.zeros((nodes.ranks, nodes.ranks))
        source_TK, cluster_TK = before_E[self.routes_TLK[:, layer - 1]], cluster_E[self.routes_TLK[:, layer]]
        np.add.at(flow_NC, (source_TK[:, :, None], cluster_TK[:, None]), 1.0)
        other_node = nodes.node_N[:, None] != nodes.node_N
        cost_NN = np.where(other_node, self.far, 1.0) * (1 - np.eye(nodes.ranks))
        return assign_clusters(flow_NC / len(self.routes_TLK), cost_NN, limits=self.limits)

"""Experts onto nodes first, then copies onto the ranks of each node; only the hottest cross nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import EMPTY, ExpertLayout
from pipermoe.layout.grouping import co_selections, group_by_co_selection, group_by_load
from pipermoe.layout.packing import pack_in_nodes
from pipermoe.layout.policies.incremental import Incremental
from pipermoe.layout.policy import Nodes


@dataclass(frozen=True, slots=True, eq=False)
class NodeFirst:
    """All copies of an expert are on one node, which keeps a token's choices on few of them; then a repair.

    With `routes_TLK`, the experts that tokens chose, those often chosen together share a node (`slack`: how far a
    node's load may be above its share); without, nodes are even in load. Where the copies inside of a node cannot even
    out its ranks, `Incremental` brings layers to `target`, across nodes if it must.
    """

    routes_TLK: NDArray[np.int64] | None = None
    slack: float = 0.02
    target: float = 1.05

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        _, _, slots = layout.shape
        # Experts without load make every node's number of experts the same.
        added = -layout.num_experts % nodes.count
        padded_LE = np.pad(load_LE, ((0, 0), (0, added)))
        node_LE = self._nodes_of_experts(padded_LE, nodes)
        slots_LNS = pack_in_nodes(node_LE, padded_LE, nodes, slots)
        packed = layout.successor(np.where(slots_LNS < layout.num_experts, slots_LNS, EMPTY))
        repaired = Incremental(self.target, rebuild_above=np.inf).plan(packed, load_LE, nodes)
        return layout.successor(repaired.slots_LNS)

    def _nodes_of_experts(self, load_LE: NDArray, nodes: Nodes) -> NDArray[np.int64]:
        if self.routes_TLK is None or nodes.count == 1:
            return group_by_load(load_LE, nodes.count)
        pairs_LEE = co_selections(self.routes_TLK, load_LE.shape[1])
        return group_by_co_selection(pairs_LEE, load_LE, nodes.count, slack=self.slack)

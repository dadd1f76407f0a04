"""Hecate's heterogeneous sharding (FSSDP, arXiv 2502.02581, algorithm 2): a home for every expert, all layers at once.

A rank may own any number of experts of a layer as long as all ranks own equally many over all layers.
"""

# L MoE layers, N ranks, S slots of a rank, E logical experts, G nodes

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import EMPTY, ExpertLayout
from pipermoe.layout.policy import Nodes


@dataclass(frozen=True, slots=True)
class HeterogeneousSharding:
    """Experts by falling load to the least loaded node, there to the least loaded rank; hottest layer first.

    The `hidden_copies` hottest of each layer, whose copies will be everywhere anyway (`SparseMaterialisation`), fill
    what is left. Made for a renewal every hundred steps or so: it moves optimizer state.
    """

    hidden_copies: int = 0

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        layers, ranks, slots = layout.shape
        homes = _Homes(np.full((layers, ranks, slots), EMPTY), -(-layers * layout.num_experts // ranks), nodes)
        order_LE = np.argsort(-load_LE, axis=1, kind="stable")
        hottest_first = np.argsort(-load_LE.max(1), kind="stable").tolist()
        for experts in (slice(self.hidden_copies, None), slice(self.hidden_copies)):
            for layer in hottest_first:
                for expert in order_LE[layer, experts].tolist():
                    homes.place(layer, expert, float(load_LE[layer, expert]))
        return layout.successor(homes.slots_LNS)


@dataclass(slots=True)
class _Homes:
    """Homes so far. A rank takes at most `most` experts of all layers, unless a layer could not be placed otherwise."""

    slots_LNS: NDArray[np.int64]
    most: int
    nodes: Nodes
    used_LN: NDArray[np.int64] = field(init=False)
    load_LN: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.used_LN = np.zeros(self.slots_LNS.shape[:2], dtype=np.int64)
        self.load_LN = np.zeros(self.slots_LNS.shape[:2])

    def place(self, layer: int, expert: int, rows: float) -> None:
        room_N = self.used_LN[layer] < self.slots_LNS.shape[2]
        open_N = room_N & (self.used_LN.sum(0) < self.most)
        if not open_N.any():
            open_N = room_N
        open_G = open_N.reshape(self.nodes.count, -1).any(1)
        load_G = self.load_LN[layer].reshape(self.nodes.count, -1).sum(1)
        on_node_N = self.nodes.node_N == np.where(open_G, load_G, np.inf).argmin()
        rank = int(np.where(open_N & on_node_N, self.load_LN[layer], np.inf).argmin())
        self.slots_LNS[layer, rank, self.used_LN[layer, rank]] = expert
        self.used_LN[layer, rank] += 1
        self.load_LN[layer, rank] += rows

"""LAER-MoE (arXiv 2602.11686): copies from a heap, spread over nodes, and the cheaper of two ways to count them."""

# L MoE layers, N ranks, S slots of a rank, E logical experts, G nodes

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import EMPTY, ExpertLayout
from pipermoe.layout.load import cross_node_share, rank_load
from pipermoe.layout.packing import heaviest_first, items_of
from pipermoe.layout.policy import Nodes
from pipermoe.layout.replicas import greedy_copies


@dataclass(frozen=True, slots=True)
class HeapReplicas:
    """Copies one by one to the expert whose copies are the largest, or equally many of each: whichever is cheaper.

    The cost of a layer is the rows of the busiest rank, and `transport` times a rank's mean of the rows that leave
    their node; 0 counts computing alone. A copy goes to the least loaded rank with room among those of the nodes that
    have the fewest copies of its expert, so that most sources find one near.
    """

    transport: float = 0.0

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        layers, ranks, slots = layout.shape
        equal_E = greedy_copies(np.ones((1, layout.num_experts)), ranks * slots)
        heap, equal = (
            layout.successor(_spread(copies_LE, load_LE, nodes, slots))
            for copies_LE in (greedy_copies(load_LE, ranks * slots), np.repeat(equal_E, layers, axis=0))
        )
        heap_is_better = self._cost(heap, load_LE, nodes) <= self._cost(equal, load_LE, nodes)
        return layout.successor(np.where(heap_is_better[:, None, None], heap.slots_LNS, equal.slots_LNS))

    def _cost(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> NDArray[np.float64]:
        leaving = cross_node_share(layout, load_LE, nodes) * load_LE.sum(1) / nodes.ranks
        return rank_load(layout, load_LE).max(1) + self.transport * leaving


def _spread(copies_LE: NDArray[np.int64], load_LE: NDArray, nodes: Nodes, slots: int) -> NDArray[np.int64]:
    """Slots (L, N, S): the heaviest copies first."""
    layers, experts = copies_LE.shape
    rows, node_N = np.arange(layers), nodes.node_N
    size_LE = load_LE / copies_LE
    table = np.full((layers, nodes.ranks, slots), EMPTY, dtype=np.int64)
    load, used = np.zeros((layers, nodes.ranks)), np.zeros((layers, nodes.ranks), dtype=np.int64)
    on_node = np.zeros((layers, nodes.count, experts), dtype=np.int64)
    for expert in heaviest_first(items_of(copies_LE), size_LE).T:
        room = used < slots
        crowded = np.where(room, on_node[rows[:, None], node_N, expert[:, None]], np.iinfo(np.int64).max)
        allowed = room & (crowded == crowded.min(1, keepdims=True))
        rank = np.where(allowed, load, np.inf).argmin(1)
        table[rows, rank, used[rows, rank]] = expert
        used[rows, rank] += 1
        load[rows, rank] += size_LE[rows, expert]
        on_node[rows, node_N[rank], expert] += 1
    return table

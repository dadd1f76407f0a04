"""How the tokens of a step fall on experts and ranks: statistics of the load, and how even a layout makes it."""

# P source ranks, L MoE layers, E logical experts, N ranks, S slots of a rank, G nodes, T tokens, K choices of a token

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import EMPTY, ExpertLayout
from pipermoe.layout.policy import Nodes
from pipermoe.layout.replicas import greedy_copies


@dataclass(frozen=True, slots=True)
class LoadStatistics:
    """Rows that each source rank sent to each expert of each layer: integers, so that all ranks plan alike."""

    counts_PLE: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.counts_PLE.ndim != 3:
            raise ValueError(f"counts have the shape (source ranks, layers, experts), these {self.counts_PLE.shape}")
        if self.counts_PLE.min(initial=0) < 0:
            raise ValueError(f"a count of {self.counts_PLE.min()} rows; counts are 0 or more")

    @property
    def load_LE(self) -> NDArray[np.int64]:
        """Rows of each expert from all sources."""
        return self.counts_PLE.sum(0)


def drift(before_LE: NDArray, after_LE: NDArray) -> NDArray[np.float64]:
    """Total variation between two loads per layer, (L,): the share of rows that went elsewhere, 0 to 1."""
    shares = [load / np.maximum(load.sum(1, keepdims=True), 1) for load in (before_LE, after_LE)]
    return np.abs(shares[0] - shares[1]).sum(1) / 2


def rank_load(layout: ExpertLayout, load_LE: NDArray) -> NDArray[np.float64]:
    """Rows that each rank computes if an expert's rows are divided evenly over its copies, (L, N)."""
    copies_LNE = layout.copies_LNE
    return np.einsum("lne,le->ln", copies_LNE, load_LE / copies_LNE.sum(1))


def slot_load(slots_NS: NDArray[np.int64], size_E: NDArray) -> NDArray[np.float64]:
    """Rows of every slot of one layer, (N, S), where each copy of an expert computes `size_E`; none in empty slots."""
    return np.where(slots_NS == EMPTY, 0.0, size_E[slots_NS])


def imbalance(load_LN: NDArray) -> NDArray[np.float64]:
    """Load of the busiest rank over the mean, per layer, (L,): 1 is perfect; 1 also where there is no load."""
    mean = load_LN.mean(1)
    return np.where(mean > 0, load_LN.max(1) / np.where(mean > 0, mean, 1), 1.0)


def least_imbalance(load_LE: NDArray, ranks: int, slots: int) -> NDArray[np.float64]:
    """A lower bound of `imbalance` over all layouts of `ranks` x `slots`, (L,).

    The busiest rank has at least the mean; and at least the largest copy that some way of copying must leave: with R
    slots in all, the best counts of copies (greedy is optimal) still leave one copy this large.
    """
    largest = (load_LE / greedy_copies(load_LE, ranks * slots, most=ranks)).max(1)
    return np.maximum(1.0, largest / np.maximum(load_LE.sum(1) / ranks, 1e-300))


def cross_node_share(layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> NDArray[np.float64]:
    """Share of the rows of each layer that leave their node, (L,), with sources spread evenly over the nodes.

    An expert's rows are divided evenly over its copies, and a node's own rows go to its own copies as far as those
    take them.
    """
    held_LGE = _copies_on_nodes(layout, nodes)
    stays_LE = np.minimum(held_LGE / layout.copies_LE[:, None], 1 / nodes.count).sum(1)
    return 1 - (stays_LE * load_LE).sum(1) / np.maximum(load_LE.sum(1), 1)


def nodes_per_token(layout: ExpertLayout, routes_TLK: NDArray[np.int64], nodes: Nodes) -> NDArray[np.float64]:
    """Nodes that a token's experts lie on, mean over tokens, (L,): the copies that a deduplicated dispatch sends.

    A choice goes to a node that the token visits already where there is one, else to the first node with a copy.
    """
    offers_LEG = _copies_on_nodes(layout, nodes).transpose(0, 2, 1) > 0
    visited_LTG = np.zeros((len(offers_LEG), len(routes_TLK), nodes.count), dtype=bool)
    every = np.arange(len(offers_LEG))[:, None]
    for choice_LT in routes_TLK.transpose(2, 1, 0):
        offered_LTG = offers_LEG[every, choice_LT]
        new_LT = ~(offered_LTG & visited_LTG).any(2)
        visited_LTG[every, np.arange(len(routes_TLK)), offered_LTG.argmax(2)] |= new_LT
    return visited_LTG.sum(2).mean(1)


def _copies_on_nodes(layout: ExpertLayout, nodes: Nodes) -> NDArray[np.int64]:
    """How many copies of each expert each node holds, (L, G, E)."""
    copies_LNE = layout.copies_LNE
    return copies_LNE.reshape(len(copies_LNE), nodes.count, -1, layout.num_experts).sum(2)

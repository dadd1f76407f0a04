"""Hecate (FSSDP, arXiv 2502.02581): every expert has one home; copies of the hottest live only while a layer computes.

Algorithm 1 chooses the copies for one use of a layer; algorithm 2, the homes, is `sharding`.
"""

# L MoE layers, N ranks, S slots of a rank, E logical experts

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import EMPTY, ExpertLayout
from pipermoe.layout.homes import homes_alone
from pipermoe.layout.policy import Nodes


@dataclass(frozen=True, slots=True)
class SparseMaterialisation:
    """Algorithm 1: fill the free slots of every rank with copies of the most loaded experts.

    `hidden_copies` is how many experts a rank can receive behind the attention of a layer (t in the paper): with at
    least as many free slots as that the hottest `hidden_copies` go to all ranks, else the free slots of all ranks are
    divided over experts in proportion to their load. None: as many as there are slots.
    """

    hidden_copies: int | None = None

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        homes_LNS = homes_alone(layout).slots_LNS
        slots_LNS = np.stack(
            [self._materialise(homes_NS, load_E, nodes) for homes_NS, load_E in zip(homes_LNS, load_LE, strict=True)]
        )
        return layout.successor(slots_LNS)

    def _materialise(self, homes_NS: NDArray[np.int64], load_E: NDArray, nodes: Nodes) -> NDArray[np.int64]:
        slots_NS = homes_NS.copy()
        free = int((homes_NS == EMPTY).sum(1).min())
        hidden = len(load_E) if self.hidden_copies is None else min(self.hidden_copies, len(load_E))
        hottest = np.argsort(-load_E, kind="stable")
        if hidden <= free:
            for expert in hottest[:hidden]:
                _give(slots_NS, expert, np.flatnonzero(~(slots_NS == expert).any(1)))
            return slots_NS
        total = int(np.minimum((homes_NS == EMPTY).sum(1), hidden).sum())
        for expert in hottest:
            copies = round(total * load_E[expert] / max(load_E.sum(), 1))
            _give(slots_NS, expert, _spread_ranks(slots_NS, expert, copies, nodes))
        return slots_NS


def _spread_ranks(slots_NS: NDArray[np.int64], expert: int, copies: int, nodes: Nodes) -> NDArray[np.int64]:
    """At most `copies` ranks with room that lack the expert, from the nodes with the most free slots first."""
    free_N = (slots_NS == EMPTY).sum(1)
    chosen: list[int] = []
    lacking = (free_N > 0) & ~(slots_NS == expert).any(1)
    for _ in range(copies):
        if not lacking.any():
            break
        free_G = np.bincount(nodes.node_N, weights=free_N * lacking, minlength=nodes.count)
        rank = int(np.where(lacking, free_G[nodes.node_N] * (free_N.max() + 1) + free_N, -1).argmax())
        chosen.append(rank)
        lacking[rank], free_N[rank] = False, free_N[rank] - 1
    return np.array(chosen, dtype=np.int64)


def _give(slots_NS: NDArray[np.int64], expert: int, ranks: NDArray[np.int64]) -> None:
    """Put a copy into the first free slot of each of `ranks` that has one."""
    empty = slots_NS[ranks] == EMPTY
    fitting = ranks[empty.any(1)]
    slots_NS[fitting, empty[empty.any(1)].argmax(1)] = expert

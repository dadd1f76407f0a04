"""Balanced: copies for the heaviest experts, packed longest first, then evened out by swaps."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.packing import items_of, longest_first, swap_down
from pipermoe.layout.policy import Nodes
from pipermoe.layout.replicas import greedy_copies

NEAR = 16  # the coldest ranks are tried first: a swap with one of them nearly always exists, and costs a quarter


@dataclass(frozen=True, slots=True)
class Balanced:
    """A layout from scratch: the best balance there is, and most copies move."""

    rounds: int = 200
    enough: float = 1.0005

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        _, ranks, slots = layout.shape
        copies_LE = greedy_copies(load_LE, ranks * slots)
        size_LE = load_LE / copies_LE
        slots_LNS = longest_first(items_of(copies_LE), size_LE, ranks, slots)
        for partners in (NEAR, ranks):
            slots_LNS = swap_down(slots_LNS, size_LE, rounds=self.rounds, partners=partners, enough=self.enough)
        return layout.successor(slots_LNS)

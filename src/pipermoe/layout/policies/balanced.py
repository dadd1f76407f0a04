"""Balanced: copies for the heaviest experts, packed longest first, then evened out by swaps."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.packing import Search, items_of, longest_first, swap_down
from pipermoe.layout.policy import Nodes
from pipermoe.layout.replicas import greedy_copies

# Many exchanges at once bring a layer near, then the two busiest ranks try more partners, and last one tries all.
SEARCHES = (
    Search(rounds=16, hottest=8, partners=3),
    Search(rounds=200, hottest=2, partners=8),
    Search(rounds=200, partners=1 << 30),
)


@dataclass(frozen=True, slots=True)
class Balanced:
    """A layout from scratch: the best balance there is, and most copies move."""

    enough: float = 1.0009

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        _, ranks, slots = layout.shape
        copies_LE = greedy_copies(load_LE, ranks * slots)
        size_LE = load_LE / copies_LE
        slots_LNS = longest_first(items_of(copies_LE), size_LE, ranks, slots)
        for search in SEARCHES:
            slots_LNS = swap_down(slots_LNS, size_LE, search, enough=self.enough)
        return layout.successor(slots_LNS)

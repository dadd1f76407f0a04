"""Swaps of experts between two ranks, without copies: the paper's migration, and the wider search beside it."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.packing import Search, swap_down
from pipermoe.layout.policy import Nodes


@dataclass(frozen=True, slots=True)
class HillClimbing:
    """Piper (arXiv 2605.05049): swap between the most and the least loaded rank while that helps.

    At most `rounds` swaps in a layer; a layer whose imbalance is at most `threshold` stays as it is.
    """

    rounds: int = 32
    threshold: float = 1.0

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        return _swapped(layout, load_LE, self.rounds, self.threshold, partners=1)


@dataclass(frozen=True, slots=True)
class Swaps:
    """The same with any other rank as the partner: reaches a lower peak in about as many swaps."""

    rounds: int = 64
    threshold: float = 1.0

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        return _swapped(layout, load_LE, self.rounds, self.threshold, partners=nodes.ranks)


def _swapped(layout: ExpertLayout, load_LE: NDArray, rounds: int, threshold: float, *, partners: int) -> ExpertLayout:
    size_LE = load_LE / layout.copies_LE
    slots_LNS = swap_down(layout.slots_LNS, size_LE, Search(rounds, partners=partners), enough=threshold)
    return layout.successor(slots_LNS)

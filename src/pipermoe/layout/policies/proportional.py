"""SwiftMoE (SYMI, arXiv 2504.19925, algorithm 1): copies in proportion to the load, experts in order over the slots."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.packing import items_of
from pipermoe.layout.policy import Nodes
from pipermoe.layout.replicas import proportional_copies


@dataclass(frozen=True, slots=True)
class Proportional:
    """Copies of an expert are neighbours, so they share a rank or lie on consecutive ones. Renewed in every step."""

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        layers, ranks, slots = layout.shape
        copies_LE = proportional_copies(load_LE, ranks * slots)
        return layout.successor(items_of(copies_LE).reshape(layers, ranks, slots))

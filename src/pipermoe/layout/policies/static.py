"""Static: nothing ever moves. What every other policy is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.policy import Nodes


@dataclass(frozen=True, slots=True)
class Static:
    """Keeps the layout."""

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        return layout

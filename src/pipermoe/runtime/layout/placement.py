"""Placement: the expert layout that a run uses now, as the runtime reads it. The one thing of it that changes."""

# L MoE layers of the model, N ranks of the expert-parallel group, S slots of a rank, E logical experts

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.homes import homes_alone, one_copy_a_rank
from pipermoe.layout.policy import Nodes
from pipermoe.layout.transfer import Move, Transfer


class Placement:
    """`layout` with at most one copy of an expert on a rank, `homes` without the copies that are weights only.

    `copies_LE` counts the copies as they were planned: an expert's capacity grows with them. Homes that are given stay
    what they are, whichever experts their ranks compute; else a home is one of the copies, and moves as late as it can.
    """

    def __init__(self, layout: ExpertLayout, nodes: Nodes, rank: int, homes: ExpertLayout | None = None) -> None:
        self.nodes, self.rank, self._fixed_homes = nodes, rank, homes
        self._use(ExpertLayout(one_copy_a_rank(layout), layout.num_experts), layout)

    def adopt(self, layout: ExpertLayout) -> Transfer:
        """Use `layout` from now on; the result are the moves of homes. What stays on its rank stays in its slot."""
        before = self.homes
        self._use(self.layout.successor(one_copy_a_rank(layout)), layout)
        return Transfer.between(before, self.homes, self.nodes)

    def _use(self, layout: ExpertLayout, planned: ExpertLayout) -> None:
        self.layout = replace(layout, version=planned.version)
        self.copies_LE = planned.copies_LE
        self.homes = self._fixed_homes or homes_alone(self.layout)
        self._spread = Transfer.between(self.homes, self.layout, self.nodes)

    @property
    def slots(self) -> int:
        """Slots of a rank."""
        return self.layout.shape[2]

    def slots_NS(self, layer: int) -> NDArray[np.int64]:
        """The slots of all ranks in one layer; layers count the MoE layers of the model."""
        return self.layout.slots_LNS[layer]

    def held(self, layer: int) -> Sequence[int]:
        """The expert in each slot of this rank."""
        return self.layout.slots_LNS[layer, self.rank].tolist()

    def at_home(self, layer: int) -> Sequence[int]:
        """The same, of those whose home this rank is; with given homes, the expert in each slot of theirs."""
        return self.homes.slots_LNS[layer, self.rank].tolist()

    def spread(self, layer: int) -> tuple[Move, ...]:
        """The moves from the homes to the other copies."""
        return tuple(move for move in self._spread.moves if move.layer == layer)

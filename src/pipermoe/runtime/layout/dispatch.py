"""Dispatch by an expert layout: rows travel to the slots that hold their experts; copies of an expert share its rows.

E experts, P ranks of the expert group, S slots of a rank, X with those of its guests, A assignments of this rank's
tokens that are kept
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipermoe.layout.expert_layout import EMPTY
from pipermoe.layout.spill import SpillRule, guest_moves, load_after, spill, with_guests
from pipermoe.layout.split import dispatch_rows, water_filling
from pipermoe.modules.experts import Experts as ExpertsModule
from pipermoe.runtime.layout.carry import Carrier
from pipermoe.runtime.layout.guests import Guests, VisitedJourney
from pipermoe.runtime.layout.placement import Placement
from pipermoe.runtime.layout.tally import Tally
from pipermoe.runtime.pipeline.dispatch import AllToAllJourney, Choices, Dispatcher, ExpertGroup, Experts, Journey
from pipermoe.runtime.pipeline.flight import Flight


class LayoutDispatch(Dispatcher):
    """Every kept choice travels as a row of its own, in one MoE layer of a placement.

    All ranks learn the counts of all, so that each divides the rows of an expert over its copies alike, and knows what
    it sends and receives without another exchange. With a `spill` rule they also agree on copies for this one
    micro-batch, which `carrier` brings.
    """

    def __init__(
        self,
        group: ExpertGroup,
        placement: Placement,
        layer: int,
        carrier: Carrier,
        tally: Tally,
        spill: SpillRule | None = None,
    ):
        super().__init__(group)
        self._placement, self._layer = placement, layer
        self._carrier, self._tally, self._spill = carrier, tally, spill

    def choices(self, experts_TK: Tensor, weights_TK: Tensor) -> Choices:
        """Every copy of an expert brings the capacity of one (SwiftMoE, arXiv 2504.19925)."""
        copies_E = torch.from_numpy(self._placement.copies_LE[self._layer]).to(experts_TK.device)
        return self.group.choices(experts_TK, weights_TK, copies_E)

    def _numbers(self, choices: Choices) -> Tensor:
        return choices.kept_E.repeat(self.group.ranks)

    def _planned_numbers(self, tokens: int) -> list[int]:
        """Only what the others tell, which is all that a journey reads."""
        counts_PE, capacity = np.array(self.group.planned_counts, dtype=np.int64), self.group.capacity(tokens)
        if capacity is not None:
            counts_PE = np.minimum(counts_PE, capacity * self._placement.copies_LE[self._layer])
        return counts_PE.ravel().tolist()

    def journey(self, choices: Choices, counts: Flight[list[int]], experts: Experts, *, keep: bool) -> Journey:
        group, slots_PS = self.group, self._placement.slots_NS(self._layer)
        received = counts.wait()[-group.ranks * group.num_experts :]
        counts_PE = np.array(received, dtype=np.int64).reshape(group.ranks, group.num_experts)
        rows_PS = water_filling(slots_PS, counts_PE.sum(0))
        copies = spill(slots_PS, rows_PS, self._spill) if self._spill else ()
        self._tally.add(self._layer, load_after(rows_PS, copies), len(copies))
        if not copies:
            return self._along(slots_PS, rows_PS, counts_PE, choices, experts, keep)
        slots_PX, rows_PX = with_guests(slots_PS, rows_PS, copies)
        moves = guest_moves(self._layer, slots_PX, slots_PS.shape[1], copies)
        visitors_X = slots_PX[group.rank, slots_PS.shape[1] :]
        assert isinstance(experts, ExpertsModule)
        held = self._placement.held(self._layer)
        guests = Guests(experts, held, visitors_X[visitors_X != EMPTY].tolist(), moves, self._carrier)
        return VisitedJourney(self._along(slots_PX, rows_PX, counts_PE, choices, guests, keep), guests)

    def _along(
        self,
        slots_PX: NDArray[np.int64],
        rows_PX: NDArray[np.int64],
        counts_PE: NDArray[np.int64],
        choices: Choices,
        experts: Experts,
        keep: bool,
    ) -> AllToAllJourney:
        """The route on which every slot of `slots_PX` gets its `rows_PX`."""
        rows_PPX = dispatch_rows(slots_PX, counts_PE, rows_PX, self._placement.nodes)
        sent_PX, received_PX = rows_PPX[self.group.rank], rows_PPX[:, self.group.rank]
        order_A = _by_slot(choices.kept(int(sent_PX.sum())), slots_PX, sent_PX)
        return AllToAllJourney(self.group, choices, order_A, sent_PX.tolist(), received_PX.tolist(), experts, keep)


def _by_slot(order_A: Tensor, slots_PS: NDArray[np.int64], sent_PS: NDArray[np.int64]) -> Tensor:
    """Assignments sorted by expert, in the order of the slots that they go to: `sent_PS` of them to each."""
    by_expert = np.flatnonzero(slots_PS != EMPTY)
    by_expert = by_expert[np.argsort(slots_PS.flat[by_expert], kind="stable")]
    slot_A = np.repeat(by_expert, sent_PS.flat[by_expert])
    if (np.diff(slot_A) >= 0).all():
        return order_A
    return order_A[torch.from_numpy(np.argsort(slot_A, kind="stable")).to(order_A.device)]

"""Mechanism 1, bound: an expert has a home, and its optimizer state goes where its home goes.

The migration of Piper (arXiv 2605.05049), SmartMoE and FlexMoE: weights and both moments travel point to point when a
home changes its rank. Copies elsewhere are weights only: their gradients come home after every step, where they are
summed in the order of ranks, and the new weights go out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from pipermoe.layout.transfer import Transfer
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.layout.carry import Carrier, SlotTensors, homeward, spread, sums
from pipermoe.runtime.layout.placement import Placement
from pipermoe.runtime.optimizer.flat_parameters import FlatParameters


class BoundExperts(FlatParameters):
    """One layer's experts in the slots of one rank, with optimizer state for every slot; `experts` are those at home.

    The ranks of edp hold the same, and each expert-parallel group carries for itself.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        layer: int,
        placement: Placement,
        groups: ProcessGroups,
        carrier: Carrier,
    ) -> None:
        super().__init__(parameters, groups.edp, 0, placement.at_home(layer))
        self._layer, self._placement, self._carrier = layer, placement, carrier

    def adopt(self, homes: Transfer, states: Sequence[Tensor]) -> None:
        """Carry the parts of `states`, vectors like the weights, of the homes that move. Collective over the group.

        The placement has the new layout already. Copies are filled by the next `gather_weights`.
        """
        moves = [move for move in homes.moves if move.layer == self._layer]
        views = [view for state in states for view in self.views(state)]
        parcels = self._carrier.launch(moves, SlotTensors(views, self.experts or ()))
        self.experts = self._placement.at_home(self._layer)
        for move, parcel_V in parcels.wait():
            SlotTensors(views, self.experts).put(move.expert, parcel_V)

    def reduce_gradients(self) -> None:
        """Sum each expert's gradients over its copies into its home, where alone they count, then over edp."""
        gradients = self._by_slot(self.gradients)
        moves = homeward(self._placement.spread(self._layer))
        for expert, total_V in sums(self._carrier.launch(moves, gradients).wait(), gradients, self._carrier.rank):
            gradients.put(expert, total_V)
        for move in moves:
            if move.source == self._carrier.rank:
                gradients.clear(move.expert)
        super().reduce_gradients()

    def gather_weights(self) -> None:
        """Give the copies the weights of their homes."""
        spread(self._carrier, self._placement.spread(self._layer), self._by_slot(self.weights))

    def _by_slot(self, whole_N: Tensor) -> SlotTensors:
        return SlotTensors(tuple(self.views(whole_N)), self._placement.held(self._layer))

"""Mechanism 3, sparse materialisation: experts have fixed homes, and their copies live only while their layer computes.

Hecate (FSSDP, arXiv 2502.02581): SparseAllGather fills the slots of a layer before it is used, in forward and again in
backward, while the layer before computes; SparseReduceScatter brings the gradients home behind the layer's backward.
Optimizer, ZeRO levels up to 1 and checkpoints know the homes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from pipermoe.layout.expert_layout import EMPTY
from pipermoe.runtime.layout.carry import Carrier, Parcels, SlotTensors, homeward, sums
from pipermoe.runtime.layout.placement import Placement
from pipermoe.runtime.optimizer.flat_parameters import FlatParameters, Landed
from pipermoe.runtime.optimizer.lent_weights import LentWeights


class SparseExperts:
    """The slots of one layer on one rank, filled from the homes and emptied in the order that `Sharding` says.

    `parameters` are the layer's, one row for each slot; `homes` holds the weights and gradients that stay.
    """

    gathers = scatters = True

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        homes: FlatParameters,
        layer: int,
        placement: Placement,
        carrier: Carrier,
    ) -> None:
        named = dict(parameters)
        self._parameters = [named[span.name] for span in homes.spans]
        self.unit = homes.unit
        self._homes, self._layer, self._placement, self._carrier = homes, layer, placement, carrier
        self._whole_gradients: Tensor | None = None
        self._leaving: tuple[Parcels, Tensor, Landed] | None = None
        for parameter in self._parameters:
            parameter.grad_dtype = torch.float32
        self.lent = LentWeights(self._parameters)
        self.lent.drop()

    def launch_gather(self) -> None:
        """SparseAllGather: start to bring the weights of other homes, unless they are here or on their way."""
        if self.lent.whole is None:
            whole_N = self._homes.weights.new_empty(sum(parameter.numel() for parameter in self._parameters))
            parcels = self._carrier.launch(self._placement.spread(self._layer), self._at_home(self._homes.weights))
            self.lent.launch(whole_N, partial(self._fill, whole_N, parcels))

    def _fill(self, whole_N: Tensor, parcels: Parcels) -> None:
        """Put the weights of homes here and elsewhere into the slots."""
        weights, homes = self._in_slots(whole_N), self._at_home(self._homes.weights)
        for expert in self._both():
            weights.put(expert, homes.take(expert))
        for move, parcel_V in parcels.wait():
            weights.put(move.expert, parcel_V)

    def keep_shard(self) -> None:
        """Take over what was written into the slots of homes."""
        assert self.lent.whole is not None
        weights, homes = self._in_slots(self.lent.whole), self._at_home(self._homes.weights)
        for expert in self._both():
            homes.put(expert, weights.take(expert))

    def open_gradients(self) -> None:
        if self._whole_gradients is None:
            size = sum(parameter.numel() for parameter in self._parameters)
            self._whole_gradients = self._homes.gradients.new_zeros(size)
            for parameter, view in zip(self._parameters, self._views(self._whole_gradients), strict=True):
                parameter.grad = view

    def launch_reduction(self, landed: Landed = lambda: None) -> None:
        """SparseReduceScatter: start to bring the gradients of copies home."""
        whole_N, self._whole_gradients = self._whole_gradients, None
        if whole_N is None:
            return  # the queue of another micro-batch has sent them along with its own
        for parameter in self._parameters:
            parameter.grad = None
        moves = homeward(self._placement.spread(self._layer))
        self._leaving = self._carrier.launch(moves, self._in_slots(whole_N)), whole_N, landed

    def settle_reduction(self) -> Tensor | None:
        """Add the gradients of all copies, summed in the order of ranks, to those of the homes."""
        if self._leaving is None:
            return None
        (parcels, whole_N, landed), self._leaving = self._leaving, None
        computed, homes = self._in_slots(whole_N), self._at_home(self._homes.gradients)
        alone = set(self._both())
        for expert, total_V in sums(parcels.wait(), computed, self._carrier.rank):
            homes.add(expert, total_V)
            alone.discard(expert)
        for expert in alone:
            homes.add(expert, computed.take(expert))
        landed()
        return whole_N

    def _both(self) -> list[int]:
        """The experts whose home is here and that are computed here."""
        held = self._placement.held(self._layer)
        return [expert for expert in self._placement.at_home(self._layer) if expert != EMPTY and expert in held]

    def _at_home(self, whole_N: Tensor) -> SlotTensors:
        return SlotTensors(tuple(self._homes.views(whole_N)), self._placement.at_home(self._layer))

    def _in_slots(self, whole_N: Tensor) -> SlotTensors:
        return SlotTensors(tuple(self._views(whole_N)), self._placement.held(self._layer))

    def _views(self, whole_N: Tensor) -> Iterator[Tensor]:
        parts = whole_N.split([parameter.numel() for parameter in self._parameters])
        for part, parameter in zip(parts, self._parameters, strict=True):
            yield part.view(parameter.shape)

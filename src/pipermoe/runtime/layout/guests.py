"""Guests: copies of experts that compute what is too much for other ranks, in one micro-batch of one layer.

They are decided after the router, on the exact counts (`layout.spill`). Their weights come from the slots that have too
much, for the forward and again for the backward, so that none is kept in between; their gradients return to these slots
before the layer's own are reduced. Whatever moves experts between steps, and any ZeRO level, does not see them.
"""

# T tokens, K choices a token, D hidden size, R rows that this rank's experts receive, S slots of a rank, X with guests

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pipermoe.layout.transfer import Move
from pipermoe.modules.experts import Experts
from pipermoe.modules.weight_gradients import gradient_of
from pipermoe.runtime.layout.carry import Carrier, Parcels, SlotTensors, homeward
from pipermoe.runtime.pipeline.dispatch import Journey
from pipermoe.runtime.pipeline.flight import Flight


class Guests:
    """One micro-batch's guests of one layer: those on this rank, and this rank's experts that are guests elsewhere.

    `experts` compute the slots of this rank, which hold `held`; `visitors` are its guests; `moves` say which expert
    visits whom, and from where. Called as a module it computes the rows of all slots, the guests' last.
    """

    def __init__(
        self, experts: Experts, held: Sequence[int], visitors: Sequence[int], moves: Sequence[Move], carrier: Carrier
    ) -> None:
        self._experts, self._held, self._visitors, self._moves, self._carrier = experts, held, visitors, moves, carrier
        self._visiting = experts.of_the_same_kind(len(visitors))
        self._coming: Parcels | None = None
        self._returning: Parcels | None = None
        self.gradients = experts.gradients
        self._drop()

    def __call__(self, x_RD: Tensor, rows: list[int]) -> Tensor:
        """`rows[x]` consecutive rows belong to slot x of this rank."""
        own, visited = rows[: len(self._held)], rows[len(self._held) :][: len(self._visitors)]
        if not visited:
            return self._experts(x_RD, own)
        own_RD, visited_RD = x_RD.split([sum(own), sum(visited)])
        return torch.cat([self._experts(own_RD, own), self._visiting(visited_RD, visited)])

    def set_out(self) -> None:
        """Start to bring the weights."""
        self._coming = self._carrier.launch(self._moves, self._own(list(self._experts.parameters())))

    @contextmanager
    def here(self) -> Iterator[None]:
        """The guests have their weights in this block; whoever reads them outside reads NaN."""
        assert self._coming is not None
        visiting = list(self._visiting.parameters())
        weights = SlotTensors([parameter.new_empty(parameter.shape) for parameter in visiting], self._visitors)
        for move, parcel_V in self._coming.wait():
            weights.put(move.expert, parcel_V)
        self._coming = None
        for parameter, tensor in zip(visiting, weights.tensors, strict=True):
            parameter.data = tensor
        yield
        self._drop()

    def _drop(self) -> None:
        for parameter in self._visiting.parameters():
            parameter.data = parameter.new_full((), math.nan).expand(parameter.shape)

    def send_gradients(self) -> None:
        """Start to bring the gradients home, once those of this micro-batch have been computed."""
        here = SlotTensors([gradient_of(parameter) for parameter in self._visiting.parameters()], self._visitors)
        self._returning = self._carrier.launch(homeward(self._moves), here)
        for parameter in self._visiting.parameters():
            parameter.grad = None

    def add_gradients(self) -> None:
        """Add what has come home to the gradients of this rank's slots, in the order of ranks."""
        assert self._returning is not None
        own = self._own([gradient_of(parameter) for parameter in self._experts.parameters()])
        for move, parcel_V in self._returning.wait():
            own.add(move.expert, parcel_V)
        self._returning = None

    def _own(self, tensors: Sequence[Tensor]) -> SlotTensors:
        return SlotTensors([tensor.detach() for tensor in tensors], self._held)


class VisitedJourney:
    """A journey whose experts are `Guests`: their weights travel beside the tokens, their gradients beside the tokens'.

    `journey` must call `guests` for its experts.
    """

    def __init__(self, journey: Journey, guests: Guests) -> None:
        self._journey, self._guests = journey, guests

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor) -> Flight:
        dispatched = self._journey.dispatch(x_TD, weights_TK)
        self._guests.set_out()
        return dispatched

    def compute(self, dispatched: Flight) -> Flight:
        with self._guests.here():
            return self._journey.compute(dispatched)

    def merge(self, combined: Flight) -> Tensor:
        return self._journey.merge(combined)

    def dispatch_gradient(self, gradient_TD: Tensor) -> Flight:
        dispatched = self._journey.dispatch_gradient(gradient_TD)
        self._guests.set_out()
        return dispatched

    def compute_gradient(self, dispatched: Flight) -> Flight:
        with self._guests.here():
            combined = self._journey.compute_gradient(dispatched)
        self._guests.gradients.add(self._guests.send_gradients)
        return combined

    def merge_gradient(self, combined: Flight) -> tuple[Tensor, Tensor]:
        self._guests.gradients.add(self._guests.add_gradients)
        return self._journey.merge_gradient(combined)

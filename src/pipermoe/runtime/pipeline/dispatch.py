"""Token dispatch: rows travel to the ranks that hold their experts, and back. The interface, and the plain way.

T tokens, K choices a token, A = T * K assignments of this rank's tokens (those kept, if experts have a capacity),
R rows that this rank's experts receive, E experts, N experts of this rank, P ranks in the expert group, D hidden size

Dropless by default and free of padding always: with a capacity, choices beyond it are left out and do not travel.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from pipermoe.modules.router import count_choices
from pipermoe.resources.dispatch import planned_choices
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.pipeline.flight import Arrived, Flight, Flying, NumbersFlying, Transport
from pipermoe.runtime.pipeline.piece import Piece

Experts = Callable[[Tensor, list[int]], Tensor]  # rows sorted by local expert (R, D) and how many each has -> (R, D)


class Journey(Protocol):
    """One micro-batch's tokens through the experts of one layer, and their gradients the same way.

    Each method but the merges ends by launching an all-to-all and gives what the next one takes.
    """

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor) -> Flight: ...

    def compute(self, dispatched: Flight) -> Flight:
        """This rank's experts over what has arrived."""
        ...

    def merge(self, combined: Flight) -> Tensor:
        """The weighted sum of what the experts made of each token (T, D)."""
        ...

    def dispatch_gradient(self, gradient_TD: Tensor) -> Flight: ...

    def compute_gradient(self, dispatched: Flight) -> Flight: ...

    def merge_gradient(self, combined: Flight) -> tuple[Tensor, Tensor]:
        """The gradients of `x_TD` and of `weights_TK`."""
        ...


@dataclass(frozen=True)
class Choices:
    """What the router chose for one micro-batch, expert (T, K), and how many of each expert's choices are kept (E,).

    Over `capacity` those with the lowest weights are dropped (Megatron's policy "probs"), or without `weights_TK` the
    last tokens'.
    """

    experts_TK: Tensor
    weights_TK: Tensor | None
    chosen_E: Tensor
    kept_E: Tensor
    capacity: int | None

    @property
    def dropped(self) -> Tensor | None:
        """How many choices go to no expert, a scalar; None without a limit."""
        return None if self.capacity is None else (self.chosen_E - self.kept_E).sum()

    @cached_property
    def order(self) -> Tensor:
        """Assignments (token * K + choice) sorted by expert; the first `kept_E` of each travel."""
        experts = self.experts_TK.flatten()
        if self.capacity is None or self.weights_TK is None:
            return experts.argsort(stable=True)
        order = self.weights_TK.flatten().argsort(descending=True, stable=True)
        return order[experts[order].argsort(stable=True)]

    @property
    def travels(self) -> Tensor:
        """Which of `order` do, bool."""
        experts = self.experts_TK.flatten()[self.order]
        first_E = self.chosen_E.cumsum(0) - self.chosen_E
        place = torch.arange(len(experts), device=experts.device) - first_E[experts]
        return place < self.kept_E[experts]

    @property
    def kept_TK(self) -> Tensor:
        """`experts_TK` with the number of experts, which none has, where a choice is dropped."""
        if self.capacity is None:
            return self.experts_TK
        travels = self.travels
        lost = torch.empty_like(travels).index_copy_(0, self.order, ~travels)
        return self.experts_TK.masked_fill(lost.view_as(self.experts_TK), len(self.kept_E))

    def kept(self, count: int) -> Tensor:
        """The `count` assignments that travel (A,), sorted by expert."""
        return self.order if self.capacity is None else self.order[positions(self.travels, count)]


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """What every way of dispatching knows: the ranks that hold all experts between them, and how they are reached.

    `planned_counts[source][expert]`, if given, says how many rows each rank of the group sends to each expert; routing
    then follows this plan and no count is exchanged or read back from a tensor. `capacity_factor` 0 drops nothing.
    """

    rank: int
    ranks: int
    num_experts: int
    top_k: int
    transport: Transport
    meter: Meter
    capacity_factor: float = 0.0
    planned_counts: Sequence[Sequence[int]] | None = None

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.ranks

    def capacity(self, tokens: int) -> int | None:
        """The most assignments of one micro-batch of one rank that an expert takes; None without a limit.

        GShard (arXiv 2006.16668, section 2.2): capacity_factor times the even share, rounded up.
        """
        if not self.capacity_factor:
            return None
        return math.ceil(self.capacity_factor * tokens * self.top_k / self.num_experts)

    def planned_choices(self, tokens: int, device: torch.device) -> Tensor | None:
        """Choices (T, K) that realise `planned_counts` on this rank, or None without a plan."""
        if self.planned_counts is None:
            return None
        choices_TK = torch.from_numpy(planned_choices(self.planned_counts[self.rank], tokens, self.top_k))
        return choices_TK.to(device, copy=True)  # made by an operation, so that it counts as memory

    def choices(self, experts_TK: Tensor, weights_TK: Tensor, copies_E: Tensor | None = None) -> Choices:
        """A micro-batch's choices, within the capacity of the experts, of which there may be several copies each."""
        capacity, chosen_E = self.capacity(len(experts_TK)), count_choices(experts_TK, self.num_experts)
        if capacity is None:
            kept_E = chosen_E
        elif copies_E is None:
            kept_E = chosen_E.clamp(max=capacity)
        else:
            kept_E = chosen_E.minimum(capacity * copies_E)
        return Choices(experts_TK, weights_TK if self.planned_counts is None else None, chosen_E, kept_E, capacity)

    def planned_numbers(self, tokens: int) -> list[int]:
        """What an exchange of the planned counts would give: sent by expert, then received by source, local expert."""
        assert self.planned_counts is not None
        mine = slice(self.rank * self.local_experts, (self.rank + 1) * self.local_experts)
        received = [count for counts in self.planned_counts for count in counts[mine]]
        most = self.capacity(tokens) or tokens
        return [min(count, most) for count in (*self.planned_counts[self.rank], *received)]

    def exchange(self, own: Tensor) -> Flight[list[int]]:
        """Tell every rank its part of `own`; the result is `own`, then what they tell this one."""
        if self.ranks == 1:
            return Arrived(own.tolist() * 2)
        received = torch.empty_like(own)
        return NumbersFlying(self.transport.all_to_all(received, own, None, None), own, received, self.meter)

    def launch(
        self, x: Tensor, before: Tensor | None, sent: list[int], received: list[int], after: Tensor | None
    ) -> Flying[Tensor]:
        """Send rows `x[before]`, `sent[p]` of them to rank p; the result is what comes, at `[after]`."""
        with self.meter.born("communication"):
            outgoing = x.contiguous() if before is None else x[before]
            incoming = x.new_empty(sum(received), *x.shape[1:])
        work = self.transport.all_to_all(incoming, outgoing, received, sent)
        return Flying(work, outgoing, incoming, lambda rows: rows if after is None else rows[after], self.meter)


class Dispatcher(ABC):
    """How the tokens of one rank meet the experts of its group."""

    def __init__(self, group: ExpertGroup):
        self.group = group

    def choices(self, experts_TK: Tensor, weights_TK: Tensor) -> Choices:
        """What the router chose, within the capacity of the experts."""
        return self.group.choices(experts_TK, weights_TK)

    def exchange_counts(self, choices: Choices) -> Flight[list[int]]:
        """Launch the exchange of row counts, the one host synchronisation of a layer.

        It gives the numbers that this rank tells the others, then those that they tell it.
        """
        if self.group.planned_counts is not None:
            return Arrived(self._planned_numbers(len(choices.experts_TK)))
        return self.group.exchange(self._numbers(choices))

    @abstractmethod
    def _numbers(self, choices: Choices) -> Tensor:
        """What this rank tells the ranks of its group, as many numbers each, end to end (int64)."""

    @abstractmethod
    def _planned_numbers(self, tokens: int) -> list[int]:
        """What an exchange of the planned counts would give."""

    @abstractmethod
    def journey(self, choices: Choices, counts: Flight[list[int]], experts: Experts, *, keep: bool) -> Journey:
        """The route of these choices. Without `keep` the experts' graph is rebuilt in backward."""


class AllToAll(Dispatcher):
    """Every kept choice travels as a row of its own."""

    def _numbers(self, choices: Choices) -> Tensor:
        return choices.kept_E

    def _planned_numbers(self, tokens: int) -> list[int]:
        return self.group.planned_numbers(tokens)

    def journey(self, choices: Choices, counts: Flight[list[int]], experts: Experts, *, keep: bool) -> AllToAllJourney:
        numbers, experts_here = counts.wait(), self.group.local_experts
        sent_PN = rows_of(numbers[: self.group.num_experts], experts_here)
        received_PN = rows_of(numbers[self.group.num_experts :], experts_here)
        order_A = choices.kept(sum(map(sum, sent_PN)))
        return AllToAllJourney(self.group, choices, order_A, sent_PN, received_PN, experts, keep)


class AllToAllJourney:
    """`sent[p]` rows go to rank p, `received[p]` come from it, sorted by expert within each; `rows[n]` are expert n's.

    `position_A` is the inverse of `order_A` where nothing is dropped. `arrange_R` brings rows into expert order,
    `restore_R` back (None where they are in order already).
    """

    def __init__(
        self,
        group: ExpertGroup,
        choices: Choices,
        order_A: Tensor,
        sent_PN: list[list[int]],
        received_PN: list[list[int]],
        experts: Experts,
        keep: bool,
    ):
        self._group, self._top_k, self._total = group, group.top_k, choices.experts_TK.numel()
        self._sent, self._received = [sum(row) for row in sent_PN], [sum(row) for row in received_PN]
        self._order_A = order_A
        self._position_A = inverse(self._order_A) if choices.capacity is None else None
        self._arrange_R, self._restore_R = arrangement(received_PN, self._order_A.device)
        rows = [sum(column) for column in zip(*received_PN, strict=True)]
        self._experts = Piece(lambda x_RD: experts(x_RD, rows), keep)
        self._merge = Piece(_weighted_sum, keep)

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor) -> Flight[Tensor]:
        self._weights_TK = weights_TK
        return self._to_experts(x_TD, self._order_A // self._top_k)

    def compute(self, dispatched: Flight[Tensor]) -> Flight[Tensor]:
        return self._to_tokens(self._experts.forward(dispatched.wait()))

    def merge(self, combined: Flight[Tensor]) -> Tensor:
        weights_TK = self._weights_TK
        del self._weights_TK
        return self._merge.forward(self._by_choice(combined), weights_TK)

    def dispatch_gradient(self, gradient_TD: Tensor) -> Flight[Tensor]:
        to_returned_TKD, self._to_weights_TK = self._merge.backward(gradient_TD)
        return self._to_experts(to_returned_TKD.flatten(0, 1), self._order_A)

    def compute_gradient(self, dispatched: Flight[Tensor]) -> Flight[Tensor]:
        (to_rows_RD,) = self._experts.backward(dispatched.wait())
        return self._to_tokens(to_rows_RD)

    def merge_gradient(self, combined: Flight[Tensor]) -> tuple[Tensor, Tensor]:
        return self._by_choice(combined).sum(1), self._to_weights_TK

    def _to_experts(self, x: Tensor, index_A: Tensor) -> Flight[Tensor]:
        """Send rows `x[index_A]`, which are sorted by expert; the result is (R, D), sorted by local expert."""
        if self._group.ranks == 1:
            return Arrived(x[index_A])
        return self._group.launch(x, index_A, self._sent, self._received, self._arrange_R)

    def _to_tokens(self, y_RD: Tensor) -> Flight[Tensor]:
        """Send the rows back to where they came from; the result is (A, D), by token and choice if all came."""
        if self._group.ranks == 1:
            return Arrived(y_RD if self._position_A is None else y_RD[self._position_A])
        return self._group.launch(y_RD, self._restore_R, self._received, self._sent, self._position_A)

    def _by_choice(self, combined: Flight[Tensor]) -> Tensor:
        """What came back, (T, K, D); zero for what was dropped."""
        rows_AD = combined.wait()
        if self._position_A is None:
            rows_AD = rows_AD.new_zeros(self._total, rows_AD.shape[1]).index_copy_(0, self._order_A, rows_AD)
        return rows_AD.view(-1, self._top_k, rows_AD.shape[1])


def _weighted_sum(returned_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    return (returned_TKD * weights_TK[..., None]).sum(1)


def rows_of(numbers: list[int], width: int) -> list[list[int]]:
    return [numbers[start : start + width] for start in range(0, len(numbers), width)]


def inverse(permutation: Tensor) -> Tensor:
    places = torch.arange(permutation.numel(), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, places)


def positions(mask: Tensor, count: int) -> Tensor:
    """Where the flat `mask` is true, of which there are `count`: unlike nonzero its shape depends on no data."""
    places = torch.where(mask, mask.cumsum(0) - 1, count)
    everywhere = torch.arange(mask.numel(), device=mask.device)
    return torch.empty(count + 1, dtype=torch.int64, device=mask.device).scatter_(0, places, everywhere)[:count]


def arrangement(received_PN: list[list[int]], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """From rows by source, then expert, to rows by expert, then source; and back."""
    ranks, experts_here = len(received_PN), len(received_PN[0])
    if ranks == 1 or experts_here == 1:
        return None, None
    counts = torch.tensor([count for row in received_PN for count in row], device=device)
    experts = torch.arange(experts_here, device=device).repeat(ranks)
    experts_R = experts.repeat_interleave(counts, output_size=sum(map(sum, received_PN)))
    arrange_R = experts_R.argsort(stable=True)
    return arrange_R, inverse(arrange_R)

"""Deduplicated dispatch: a token crosses once to each rank that holds any of its experts, and one sum comes back.

T tokens, K choices a token, A assignments of this rank's tokens that are kept, C copies of tokens that it sends (one
per token and rank), B copies that it receives, R rows that its experts compute, N experts of this rank, P ranks

    x --copies--> ranks --expand--> experts --weigh, sum by copy--> back --sum by token--> out

The weights travel with the copies, so each rank returns one row per copy and not one per choice; backward sends the
gradient of the sum once per copy likewise. Redundancy bypassing of X-MoE (arXiv 2508.13337), by rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipermoe.resources.dispatch import planned_copies
from pipermoe.runtime.pipeline.dispatch import (
    Choices,
    Dispatcher,
    ExpertGroup,
    Experts,
    arrangement,
    positions,
    rows_of,
)
from pipermoe.runtime.pipeline.flight import Both, Flight, Flying
from pipermoe.runtime.pipeline.piece import Piece


class Rows(NamedTuple):
    """What goes to each rank, or comes from it: rows by local expert of the receiver, and copies of tokens."""

    by_expert_PN: list[list[int]]
    copies: list[int]

    @classmethod
    def of(cls, rows_PM: list[list[int]]) -> Rows:
        """From the exchanged numbers: for every rank its experts' rows and behind them the copies."""
        return cls([row[:-1] for row in rows_PM], [row[-1] for row in rows_PM])

    @property
    def by_rank(self) -> list[int]:
        return [sum(row) for row in self.by_expert_PN]


class Deduplicated(Dispatcher):
    """One copy of a token per rank; worth it when tokens have several experts on one."""

    def _numbers(self, choices: Choices) -> Tensor:
        copies_P1 = destinations(choices.kept_TK, self.group).sum(1, keepdim=True)
        return torch.cat((choices.kept_E.view(self.group.ranks, -1), copies_P1), 1).flatten()

    def _planned_numbers(self, tokens: int) -> list[int]:
        group = self.group
        assert group.planned_counts is not None
        copies_PP = planned_copies(group.planned_counts, tokens, group.top_k, group.capacity(tokens))
        copies = (*copies_PP[group.rank].tolist(), *copies_PP[:, group.rank].tolist())
        blocks = rows_of(group.planned_numbers(tokens), group.local_experts)
        return [number for rows, count in zip(blocks, copies, strict=True) for number in (*rows, count)]

    def journey(
        self, choices: Choices, counts: Flight[list[int]], experts: Experts, *, keep: bool
    ) -> DeduplicatedJourney:
        group, numbers = self.group, counts.wait()
        rows_PM = rows_of(numbers, group.local_experts + 1)
        sent, received = Rows.of(rows_PM[: group.ranks]), Rows.of(rows_PM[group.ranks :])
        order_A = choices.kept(sum(sent.by_rank))
        goes_PT = destinations(choices.kept_TK, group)
        return DeduplicatedJourney(group, choices.experts_TK, order_A, goes_PT, sent, received, experts, keep)


def destinations(experts_TK: Tensor, group: ExpertGroup) -> Tensor:
    """Which tokens go to which rank of the group (P, T), bool as int64; an expert that no rank has is nobody's."""
    goes_TP = experts_TK.new_zeros(len(experts_TK), group.ranks + 1).scatter_(1, experts_TK // group.local_experts, 1)
    return goes_TP[:, : group.ranks].t()


class Copies:
    """One copy per token and rank: `token_C` names the token of each, ordered by rank, then token."""

    def __init__(self, group: ExpertGroup, goes_PT: Tensor, sent: list[int], received: list[int]):
        self._group, self._sent, self._received, self._tokens = group, sent, received, goes_PT.shape[1]
        place_C = positions(goes_PT.flatten() > 0, sum(sent))
        self.token_C = place_C % self._tokens

    def out(self, x_TD: Tensor) -> Flying[Tensor]:
        return self._group.launch(x_TD, self.token_C, self._sent, self._received, None)

    def back(self, y_BD: Tensor) -> Flying[Tensor]:
        return self._group.launch(y_BD, None, self._received, self._sent, None)

    def summed(self, arrived_CD: Tensor) -> Tensor:
        """The sum over each token's copies (T, D), of which the caller keeps none."""
        sums_TD = arrived_CD.new_zeros(self._tokens, arrived_CD.shape[1]).index_add_(0, self.token_C, arrived_CD)
        self._group.meter.release(arrived_CD)
        return sums_TD


class DeduplicatedJourney:
    """`order_A` are the choices (token * K + choice) that travel, by expert; `goes_PT` says which tokens go where.

    A choice travels as a slot, the place of its copy among those of its rank; `copy_R` is the copy of an expert's row.
    """

    def __init__(
        self,
        group: ExpertGroup,
        experts_TK: Tensor,
        order_A: Tensor,
        goes_PT: Tensor,
        sent: Rows,
        received: Rows,
        experts: Experts,
        keep: bool,
    ):
        self._group, self._shape, device = group, experts_TK.shape, experts_TK.device
        self._sent, self._received = sent.by_rank, received.by_rank
        self._order_A = order_A
        self._arrange_R, self._restore_R = arrangement(received.by_expert_PN, device)
        self._copies = Copies(group, goes_PT, sent.copies, received.copies)
        rank_A = experts_TK.flatten()[order_A] // group.local_experts
        place = (goes_PT.flatten().cumsum(0) - 1).view_as(goes_PT)[rank_A, order_A // experts_TK.shape[1]]
        self._slot_A = place - _firsts(sent.copies, device)[rank_A]
        self._first_copy_R = _firsts(received.copies, device).repeat_interleave(
            torch.tensor(self._received, device=device), output_size=sum(self._received)
        )
        self._rows = [sum(column) for column in zip(*received.by_expert_PN, strict=True)]
        self._all_experts, self._keep = experts, keep

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor) -> Flight[tuple[Tensor, Tensor]]:
        """Copies (B, D), and for each choice its copy and the bits of its weight (R, 2) int32, sorted by expert."""
        self._dtype = weights_TK.dtype
        bits_A = weights_TK.flatten()[self._order_A].float().view(torch.int32)
        slots_A2 = torch.stack((self._slot_A.int(), bits_A), 1)
        del self._slot_A
        slots = self._group.launch(slots_A2, None, self._sent, self._received, None)
        return Both(slots, self._copies.out(x_TD))

    def compute(self, dispatched: Flight[tuple[Tensor, Tensor]]) -> Flight[Tensor]:
        """What this rank's experts make of each copy: the weighted sum over those it goes to."""
        slots_R2, copies_BD = dispatched.wait()
        copy_R, weight_R = slots_R2[:, 0] + self._first_copy_R, slots_R2[:, 1].contiguous().view(torch.float32)
        if self._arrange_R is not None:
            copy_R, weight_R = copy_R[self._arrange_R], weight_R[self._arrange_R]
        experts, rows = self._all_experts, self._rows  # a piece that held the journey would leave both to the collector

        def weighted_sums(x_BD: Tensor, weight_R: Tensor) -> Tensor:
            y_RD = experts(x_BD[copy_R], rows)
            return torch.zeros_like(x_BD).index_add(0, copy_R, y_RD * weight_R[:, None])

        self._experts = Piece(weighted_sums, self._keep)
        returning = self._copies.back(self._experts.forward(copies_BD, weight_R.to(self._dtype)))
        self._group.meter.release(slots_R2)
        return returning

    def merge(self, combined: Flight[Tensor]) -> Tensor:
        return self._copies.summed(combined.wait())

    def dispatch_gradient(self, gradient_TD: Tensor) -> Flight[Tensor]:
        return self._copies.out(gradient_TD)

    def compute_gradient(self, dispatched: Flight[Tensor]) -> Flight[tuple[Tensor, Tensor]]:
        gradient_BD = dispatched.wait()
        to_copies_BD, to_weight_R = self._experts.backward(gradient_BD)
        self._group.meter.release(gradient_BD)
        del gradient_BD
        weights = self._group.launch(to_weight_R, self._restore_R, self._received, self._sent, None)
        return Both(weights, self._copies.back(to_copies_BD))

    def merge_gradient(self, combined: Flight[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        to_weight_A, to_copies_CD = combined.wait()
        to_weights = to_weight_A.new_zeros(self._shape.numel()).index_copy_(0, self._order_A, to_weight_A)
        to_x_TD = self._copies.summed(to_copies_CD)
        self._group.meter.release(to_weight_A)
        return to_x_TD, to_weights.view(self._shape)


def _firsts(lengths: list[int], device: torch.device) -> Tensor:
    """Where each of consecutive blocks begins."""
    ends = torch.tensor(lengths, device=device).cumsum(0)
    return ends - torch.tensor(lengths, device=device)

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
from pipermoe.runtime.pipeline.dispatch import Choices, ExpertGroup, Experts, arrangement, positions, rows_of
from pipermoe.runtime.pipeline.flight import Arrived, Both, Flight, Flying, NumbersFlying
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


class Deduplicated:
    """One copy of a token per rank; worth it when tokens have several experts on one."""

    def __init__(self, group: ExpertGroup):
        self.group = group

    def choices(self, experts_TK: Tensor, weights_TK: Tensor) -> Choices:
        return self.group.choices(experts_TK, weights_TK)

    def exchange_counts(self, choices: Choices) -> Flight[list[int]]:
        group, tokens = self.group, len(choices.experts_TK)
        if (planned := group.planned_numbers(tokens)) is not None:
            return Arrived(self._with_planned_copies(planned, tokens))
        copies_P1 = self._copies(choices).sum(1, keepdim=True)
        own = torch.cat((choices.kept_E.view(group.ranks, -1), copies_P1), 1).flatten()
        received = torch.empty_like(own)
        work = group.transport.all_to_all(received, own, None, None)
        return NumbersFlying(work, own, received, group.meter)

    def journey(
        self, choices: Choices, counts: Flight[list[int]], experts: Experts, *, keep: bool
    ) -> DeduplicatedJourney:
        group, numbers = self.group, counts.wait()
        rows_PM = rows_of(numbers, group.local_experts + 1)
        sent, received = Rows.of(rows_PM[: group.ranks]), Rows.of(rows_PM[group.ranks :])
        return DeduplicatedJourney(group, choices, sent, received, self._copies(choices), experts, keep)

    def _copies(self, choices: Choices) -> Tensor:
        """Which tokens go to which rank (P, T), bool as int64."""
        experts_TK, ranks = choices.experts_TK, self.group.ranks
        rank_TK = experts_TK // self.group.local_experts
        if choices.capacity is not None:
            lost = torch.empty_like(choices.travels).index_copy_(0, choices.order, ~choices.travels)
            rank_TK = rank_TK.masked_fill(lost.view_as(rank_TK), ranks)  # to nobody
        goes_TP = rank_TK.new_zeros(len(rank_TK), ranks + 1).scatter_(1, rank_TK, 1)
        return goes_TP[:, :ranks].t()

    def _with_planned_copies(self, planned: list[int], tokens: int) -> list[int]:
        group = self.group
        assert group.planned_counts is not None
        copies_PP = planned_copies(group.planned_counts, tokens, group.top_k, group.capacity(tokens))
        copies = (*copies_PP[group.rank].tolist(), *copies_PP[:, group.rank].tolist())
        blocks = rows_of(planned, group.local_experts)
        return [number for rows, count in zip(blocks, copies, strict=True) for number in (*rows, count)]


class DeduplicatedJourney:
    """`token_C` names the token of each copy, ordered by rank, then token; `copy_R` the copy of each expert row."""

    def __init__(
        self,
        group: ExpertGroup,
        choices: Choices,
        sent: Rows,
        received: Rows,
        goes_PT: Tensor,
        experts: Experts,
        keep: bool,
    ):
        self._group, self._shape, device = group, choices.experts_TK.shape, choices.experts_TK.device
        self._copies, self._received_copies = sent.copies, received.copies
        self._sent, self._received = sent.by_rank, received.by_rank
        self._order_A = choices.kept(sum(self._sent))
        self._arrange_R, self._restore_R = arrangement(received.by_expert_PN, device)
        goes = goes_PT.flatten()
        self._token_C = positions(goes > 0, sum(self._copies)) % goes_PT.shape[1]
        rank_A = choices.experts_TK.flatten()[self._order_A] // group.local_experts
        place = (goes.cumsum(0) - 1).view_as(goes_PT)[rank_A, self._order_A // group.top_k]
        self._slot_A = place - _firsts(self._copies, device)[rank_A]
        self._first_copy_R = _firsts(self._received_copies, device).repeat_interleave(
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
        return Both(slots, self._copies_out(x_TD))

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
        return self._copies_back(self._experts.forward(copies_BD, weight_R.to(self._dtype)))

    def merge(self, combined: Flight[Tensor]) -> Tensor:
        return self._sum_by_token(combined.wait())

    def dispatch_gradient(self, gradient_TD: Tensor) -> Flight[Tensor]:
        return self._copies_out(gradient_TD)

    def compute_gradient(self, dispatched: Flight[Tensor]) -> Flight[tuple[Tensor, Tensor]]:
        to_copies_BD, to_weight_R = self._experts.backward(dispatched.wait())
        weights = self._group.launch(to_weight_R, self._restore_R, self._received, self._sent, None)
        return Both(weights, self._copies_back(to_copies_BD))

    def merge_gradient(self, combined: Flight[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        to_weight_A, to_copies_CD = combined.wait()
        to_weights = to_weight_A.new_zeros(self._shape.numel()).index_copy_(0, self._order_A, to_weight_A)
        return self._sum_by_token(to_copies_CD), to_weights.view(self._shape)

    def _copies_out(self, x_TD: Tensor) -> Flying[Tensor]:
        return self._group.launch(x_TD, self._token_C, self._copies, self._received_copies, None)

    def _copies_back(self, y_BD: Tensor) -> Flying[Tensor]:
        return self._group.launch(y_BD, None, self._received_copies, self._copies, None)

    def _sum_by_token(self, rows_CD: Tensor) -> Tensor:
        return rows_CD.new_zeros(self._shape[0], rows_CD.shape[1]).index_add_(0, self._token_C, rows_CD)


def _firsts(lengths: list[int], device: torch.device) -> Tensor:
    """Where each of consecutive blocks begins."""
    ends = torch.tensor(lengths, device=device).cumsum(0)
    return ends - torch.tensor(lengths, device=device)

"""Deduplicated dispatch by node: a token crosses once to each node that holds any of its experts; one sum comes back.

T tokens, K choices a token, E experts, D hidden size, N nodes of L ranks; C copies of this rank's tokens (one per token
and node), B copies that come to this rank, M numbers that a rank tells another: rows by expert of its node, copies for
each of its ranks, copies for all of it

    x --copies--> the same place on every node --deduplicated dispatch inside the node--> out, sums by token

What arrives on a node is dispatched there as if the copies were the tokens of the rank that received them; what crosses
back is then already summed over the node. With each copy cross its choices and their weights, `nobody` (a number that
no expert has) for those of other nodes. Redundancy bypassing of X-MoE (arXiv 2508.13337); DeepEP crosses likewise
between equal places. Steps inside a node are waited for: only what crosses travels while something else is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipermoe.resources.dispatch import planned_copies
from pipermoe.runtime.pipeline.deduplicated import Copies, DeduplicatedJourney, Rows, destinations
from pipermoe.runtime.pipeline.dispatch import Choices, Dispatcher, ExpertGroup, Experts
from pipermoe.runtime.pipeline.flight import Both, Flight


class NodeRows(NamedTuple):
    """What this rank exchanges: copies with the nodes, and rows and copies with the ranks of its own node."""

    sent_across: list[int]
    received_across: list[int]
    sent_inside: Rows
    received_inside: Rows

    @classmethod
    def of(cls, sent_NM: NDArray, received_NLM: NDArray, place: int) -> NodeRows:
        """For the rank at `place` of its node, from what it tells each node and what the ranks of all nodes tell it.

        The copies that this rank passes on come from the ranks at its place; those that it gets, by all of its node.
        """
        ranks, numbers = received_NLM.shape[1:]
        own = (numbers - 1 - ranks) // ranks
        passed_M, rows_to_LN = received_NLM[:, place].sum(0), received_NLM.sum(0)
        mine = slice(place * own, (place + 1) * own)
        return cls(
            sent_NM[:, -1].tolist(),
            received_NLM[:, place, -1].tolist(),
            Rows(passed_M[: ranks * own].reshape(ranks, own).tolist(), passed_M[ranks * own : -1].tolist()),
            Rows(rows_to_LN[:, mine].tolist(), rows_to_LN[:, ranks * own + place].tolist()),
        )


class DeduplicatedByNode(Dispatcher):
    """`across` are the ranks at this one's place on every node, with a node's experts each; `inside` is this node."""

    def __init__(self, group: ExpertGroup, across: ExpertGroup, inside: ExpertGroup):
        super().__init__(group)
        self._across, self._inside = across, inside

    def _numbers(self, choices: Choices) -> Tensor:
        nodes, kept_TK = self._across.ranks, choices.kept_TK
        copies_NL = destinations(kept_TK, self.group).sum(1).view(nodes, -1)
        copies_N1 = destinations(kept_TK, self._across).sum(1, keepdim=True)
        told_NM = torch.cat((choices.kept_E.view(nodes, -1), copies_NL, copies_N1), 1)
        return told_NM.repeat_interleave(self._inside.ranks, 0).flatten()  # every rank of a node hears of all of it

    def journey(self, choices: Choices, counts: Flight[list[int]], experts: Experts, *, keep: bool) -> NodeJourney:
        nodes, ranks = self._across.ranks, self._inside.ranks
        sent_NLM, received_NLM = np.array(counts.wait()).reshape(2, nodes, ranks, -1)
        rows = NodeRows.of(sent_NLM[:, 0], received_NLM, self._inside.rank)
        return NodeJourney(self._across, self._inside, choices, rows, experts, keep)

    def _planned_numbers(self, tokens: int) -> list[int]:
        group, nodes, ranks = self.group, self._across.ranks, self._inside.ranks
        assert group.planned_counts is not None
        rows_PE = np.minimum(group.planned_counts, group.capacity(tokens) or tokens)
        copies = [
            planned_copies(group.planned_counts, tokens, group.top_k, group.capacity(tokens), blocks)
            for blocks in (group.ranks, nodes)
        ]
        told_PNM = np.concatenate([each.reshape(group.ranks, nodes, -1) for each in (rows_PE, *copies)], 2)
        sent_PM = told_PNM[group.rank].repeat(ranks, 0)
        return [*sent_PM.flatten().tolist(), *told_PNM[:, self._across.rank].flatten().tolist()]


class NodeJourney:
    """`expert_CK` is the place of each choice of a copy among the experts of the node that the copy goes to."""

    def __init__(
        self,
        across: ExpertGroup,
        inside: ExpertGroup,
        choices: Choices,
        rows: NodeRows,
        experts: Experts,
        keep: bool,
    ):
        self._across, self._inside, self._rows, self._experts, self._keep = across, inside, rows, experts, keep
        kept_TK, nobody = choices.kept_TK, inside.num_experts
        goes_NT = destinations(kept_TK, across)
        self._copies = Copies(across, goes_NT, rows.sent_across, rows.received_across)
        node_C = torch.arange(across.ranks, device=kept_TK.device).repeat_interleave(
            torch.tensor(rows.sent_across, device=kept_TK.device), output_size=sum(rows.sent_across)
        )
        expert_CK = kept_TK[self._copies.token_C] - node_C[:, None] * nobody
        self._expert_CK = expert_CK.masked_fill((expert_CK < 0) | (expert_CK > nobody), nobody)

    def dispatch(self, x_TD: Tensor, weights_TK: Tensor) -> Flight[tuple[Tensor, Tensor]]:
        """Copies (B, D), and of each its experts here and the bits of their weights (B, K, 2) int32."""
        self._dtype = weights_TK.dtype
        bits_CK = weights_TK[self._copies.token_C].float().view(torch.int32)
        notes_CK2 = torch.stack((self._expert_CK.int(), bits_CK), 2)
        del self._expert_CK
        sent, received = self._rows.sent_across, self._rows.received_across
        return Both(self._across.launch(notes_CK2, None, sent, received, None), self._copies.out(x_TD))

    def compute(self, dispatched: Flight[tuple[Tensor, Tensor]]) -> Flight[Tensor]:
        """What the experts of this node make of each copy: the sum over its ranks."""
        notes_BK2, copies_BD = dispatched.wait()
        expert_BK, weights_BK = notes_BK2[..., 0].long(), notes_BK2[..., 1].contiguous().view(torch.float32)
        sent, received = self._rows.sent_inside, self._rows.received_inside
        order_A = expert_BK.flatten().argsort(stable=True)[: sum(sent.by_rank)]
        goes_LB = destinations(expert_BK, self._inside)
        self._within = DeduplicatedJourney(
            self._inside, expert_BK, order_A, goes_LB, sent, received, self._experts, self._keep
        )
        inside = self._within.dispatch(copies_BD, weights_BK.to(self._dtype))
        for arrived in (notes_BK2, copies_BD):
            self._across.meter.release(arrived)
        del notes_BK2, copies_BD, arrived
        return self._copies.back(self._within.merge(self._within.compute(inside)))

    def merge(self, combined: Flight[Tensor]) -> Tensor:
        return self._copies.summed(combined.wait())

    def dispatch_gradient(self, gradient_TD: Tensor) -> Flight[Tensor]:
        return self._copies.out(gradient_TD)

    def compute_gradient(self, dispatched: Flight[Tensor]) -> Flight[tuple[Tensor, Tensor]]:
        gradient_BD = dispatched.wait()
        inside = self._within.dispatch_gradient(gradient_BD)
        self._across.meter.release(gradient_BD)
        del gradient_BD
        to_copies_BD, to_weights_BK = self._within.merge_gradient(self._within.compute_gradient(inside))
        sent, received = self._rows.sent_across, self._rows.received_across
        weights = self._across.launch(to_weights_BK, None, received, sent, None)
        return Both(weights, self._copies.back(to_copies_BD))

    def merge_gradient(self, combined: Flight[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        to_weights_CK, to_copies_CD = combined.wait()
        to_x_TD = self._copies.summed(to_copies_CD)
        del to_copies_CD
        return to_x_TD, self._copies.summed(to_weights_CK)

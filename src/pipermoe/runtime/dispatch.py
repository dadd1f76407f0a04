"""Dropless token dispatch: rows travel to the ranks that hold their experts, and back, by uneven all-to-alls.

T tokens, K choices a token, A = T * K assignments of this rank's tokens, R rows that this rank's experts receive,
E experts, N experts of this rank, P ranks in the expert-parallel group, D hidden size

An exchange moves data and knows nothing of autograd: the backward of `to_experts` is `to_tokens` and the reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipermoe.runtime.meter import Meter
from pipermoe.runtime.router import count_choices
from pipermoe.runtime.trace import ALL_TO_ALL


class Flying:
    """A collective in flight. It keeps its buffers alive; `wait` gives the finished output, once.

    `finish` makes the output of the received tensor.
    """

    def __init__(
        self, work: dist.Work | None, sent: Tensor, received: Tensor, finish: Callable[[Tensor], Tensor], meter: Meter
    ):
        assert work is not None
        self._work, self._buffers, self._finish, self._meter = work, (sent, received), finish, meter
        self._landed = meter.launched(ALL_TO_ALL)

    def wait(self) -> Tensor:
        with self._meter.term("all_to_all"):
            self._work.wait()
        self._landed()
        sent, received = self._buffers
        del self._buffers, self._work
        self._meter.release(sent)
        result = self._finish(received)
        if result is not received:
            self._meter.release(received)
        return result


class Arrived:
    """What needed no travel."""

    def __init__(self, result: Tensor):
        self._result = result

    def wait(self) -> Tensor:
        result = self._result
        del self._result
        return result


@dataclass(frozen=True, slots=True)
class Route:
    """How one micro-batch's rows travel in one layer.

    `order_A` lists assignments (token * K + choice) sorted by expert, `position_A` is its inverse. `sent[p]` rows go to
    rank p, `received[p]` come from it, sorted by expert within each; `arrange_R` brings them into expert order,
    `restore_R` back (None where they are in order already). `rows[n]` rows belong to local expert n.
    """

    order_A: Tensor
    position_A: Tensor
    sent: list[int]
    received: list[int]
    rows: list[int]
    arrange_R: Tensor | None
    restore_R: Tensor | None


class Exchange:
    """The all-to-alls of one expert-parallel group.

    `planned_counts[source][expert]`, if given, says how many rows each rank of the group sends to each expert; routing
    then follows this plan and no count is exchanged or read back from a tensor.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        meter: Meter,
        planned_counts: Sequence[Sequence[int]] | None = None,
    ):
        self.group, self.meter, self.num_experts = group, meter, num_experts
        self.ranks, self.rank = group.size(), group.rank()
        self.local_experts = num_experts // self.ranks
        self.planned_counts = planned_counts

    def planned_choices(self, tokens: int, top_k: int, device: torch.device) -> Tensor | None:
        """Choices (T, K) that realise `planned_counts` on this rank, or None without a plan."""
        if self.planned_counts is None:
            return None
        counts_E = torch.tensor(self.planned_counts[self.rank], device=device)
        experts_A = torch.arange(self.num_experts, device=device).repeat_interleave(
            counts_E, output_size=tokens * top_k
        )
        # Column-wise, so that a token meets different experts as long as none is chosen by more than T.
        return experts_A.view(top_k, tokens).t().contiguous()

    def exchange_counts(self, experts_TK: Tensor) -> Flying | Arrived:
        """Launch the exchange of row counts. Its result is for `route` alone."""
        if self.planned_counts is not None:
            return Arrived(experts_TK)
        counts_E = count_choices(experts_TK, self.num_experts)
        if self.ranks == 1:
            return Arrived(counts_E)
        counts_PN = torch.empty_like(counts_E)
        work = dist.all_to_all_single(counts_PN, counts_E, group=self.group, async_op=True)
        return Flying(work, counts_E, counts_PN, lambda received_PN: torch.cat((counts_E, received_PN)), self.meter)

    def route(self, experts_TK: Tensor, counts: Flying | Arrived) -> Route:
        """The route of these choices. Reading the counts is the one host synchronisation of a layer."""
        order_A = experts_TK.flatten().argsort(stable=True)
        sent_PN, received_PN = self._counts(counts.wait())
        arrange_R, restore_R = self._arrangement(received_PN, experts_TK.device)
        return Route(
            order_A=order_A,
            position_A=_inverse(order_A),
            sent=[sum(row) for row in sent_PN],
            received=[sum(row) for row in received_PN],
            rows=[sum(column) for column in zip(*received_PN, strict=True)],
            arrange_R=arrange_R,
            restore_R=restore_R,
        )

    def to_experts(self, x: Tensor, index_A: Tensor, route: Route) -> Flying | Arrived:
        """Send rows `x[index_A]`, which are sorted by expert; the result is (R, D), sorted by local expert."""
        if self.ranks == 1:
            return Arrived(x[index_A])
        return self._launch(x, index_A, route.sent, route.received, route.arrange_R)

    def to_tokens(self, y_RD: Tensor, route: Route) -> Flying | Arrived:
        """Send the rows back to where they came from; the result is (A, D) in the order token * K + choice."""
        if self.ranks == 1:
            return Arrived(y_RD[route.position_A])
        return self._launch(y_RD, route.restore_R, route.received, route.sent, route.position_A)

    def _launch(
        self, x: Tensor, before: Tensor | None, sent: list[int], received: list[int], after: Tensor | None
    ) -> Flying:
        with self.meter.born("communication"):
            outgoing = x.contiguous() if before is None else x[before]
            incoming = x.new_empty(sum(received), x.shape[1])
        work = dist.all_to_all_single(incoming, outgoing, received, sent, group=self.group, async_op=True)
        return Flying(work, outgoing, incoming, lambda rows: rows if after is None else rows[after], self.meter)

    def _counts(self, exchanged: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Rows sent to and received from each rank of the group, by the receiver's expert (P, N)."""
        local, mine = self.local_experts, slice(self.rank * self.local_experts, (self.rank + 1) * self.local_experts)
        if self.planned_counts is not None:
            sent_E = list(self.planned_counts[self.rank])
            received_PN = [list(counts[mine]) for counts in self.planned_counts]
        else:
            numbers = exchanged.tolist()
            sent_E = numbers[: self.num_experts]
            received_PN = _rows_of(numbers[-self.num_experts :], local)
        return _rows_of(sent_E, local), received_PN

    def _arrangement(self, received_PN: list[list[int]], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """From rows by source, then expert, to rows by expert, then source; and back."""
        if self.ranks == 1 or self.local_experts == 1:
            return None, None
        counts = torch.tensor([count for row in received_PN for count in row], device=device)
        experts = torch.arange(self.local_experts, device=device).repeat(self.ranks)
        experts_R = experts.repeat_interleave(counts, output_size=sum(map(sum, received_PN)))
        arrange_R = experts_R.argsort(stable=True)
        return arrange_R, _inverse(arrange_R)


def _rows_of(numbers: list[int], width: int) -> list[list[int]]:
    return [numbers[start : start + width] for start in range(0, len(numbers), width)]


def _inverse(permutation: Tensor) -> Tensor:
    positions = torch.arange(permutation.numel(), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, positions)

"""All ranks measure their network: collectives of several sizes in groups of several sizes, latency and bandwidth."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from pipermoe.measure.clock import Call, wall_seconds
from pipermoe.measure.samples import Point, summarize
from pipermoe.measure.sizes import BYTES_PER_ELEMENT
from pipermoe.specs.network import Collective

FEWEST_CALLS, MOST_CALLS = 5, 40
SKEW = 3  # in the uneven all-to-all one rank receives this many times what the others do


def group_sizes(ranks: int) -> list[int]:
    """The group sizes that are measured: powers of two that divide `ranks`, and all ranks."""
    return [size for size in (2**n for n in range(1, ranks.bit_length())) if size < ranks and ranks % size == 0] + [
        ranks
    ]


class Network:
    """The groups of one rank and its device, and calls on them."""

    def __init__(self, device: torch.device, seconds_per_size: float) -> None:
        self.device, self.seconds_per_size = device, seconds_per_size
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.groups = {size: self._own_group(size) for size in group_sizes(self.ranks)}

    def _own_group(self, size: int) -> dist.ProcessGroup:
        """The group of `size` consecutive ranks that holds this rank; every rank must create every group."""
        starts = range(0, self.ranks, size)
        groups = [dist.new_group(list(range(start, start + size))) for start in starts]
        group = groups[self.rank // size]
        assert isinstance(group, dist.ProcessGroup)
        return group

    def meet(self) -> None:
        """The smallest all-to-all, with the nearest neighbours."""
        group = self.groups[min(self.groups)]
        x = self._tensor(group.size())
        dist.all_to_all_single(torch.empty_like(x), x, group=group)

    def point(self, collective: Collective, group_size: int, message_bytes: int) -> Point | None:
        """Seconds of one call that hands about `message_bytes` to the network, as `LinkCost` counts bytes.

        None on a rank without a partner ("send" with an odd number of ranks).
        """
        if collective == "send":
            handed, call = self._send(message_bytes)
            return self._timed(call, handed, calls_per_message=2)
        handed, call = self._collective(collective, group_size, message_bytes)
        return self._timed(call, handed)

    def skewed_all_to_all(self, message_bytes: int) -> Point | None:
        """An all-to-all in which everyone sends `SKEW` shares to rank 0; `size` is the most bytes a rank receives."""
        others = self.ranks - 1
        share = max(1, message_bytes // BYTES_PER_ELEMENT // (SKEW + others - 1))
        sends = [share * (SKEW if peer == 0 else 1) for peer in range(self.ranks)]
        receives = [share * (SKEW if self.rank == 0 else 1)] * self.ranks
        x, y = self._tensor(sum(sends)), self._tensor(sum(receives))
        call = functools.partial(dist.all_to_all_single, y, x, receives, sends)
        return self._timed(call, BYTES_PER_ELEMENT * share * max(SKEW * others, SKEW + others - 1))

    def _timed(self, call: Call | None, handed_bytes: int, calls_per_message: int = 1) -> Point | None:
        """Every rank makes the same number of calls, agreed on by the slowest; each call keeps the ranks in step."""
        dist.barrier()
        estimate = torch.tensor([wall_seconds(call, 2) / 2 if call else 0.0], device=self.device)
        dist.all_reduce(estimate, op=dist.ReduceOp.MAX)
        calls = min(MOST_CALLS, max(FEWEST_CALLS, round(self.seconds_per_size / max(float(estimate), 1e-6))))
        if call is None:
            return None
        samples = summarize([wall_seconds(call, 1) / calls_per_message for _ in range(calls)])
        return Point(
            handed_bytes, handed_bytes, samples.seconds, round(samples.spread, 4), samples.kept, samples.dropped
        )

    def _send(self, message_bytes: int) -> tuple[int, Call | None]:
        """A message to the neighbour and one back, all pairs at once; half of it is one message."""
        partner = self.rank ^ 1
        if partner >= self.ranks:
            return 0, None
        x, y = self._tensor(message_bytes // BYTES_PER_ELEMENT), self._tensor(message_bytes // BYTES_PER_ELEMENT)
        first = self.rank < partner

        def ping_pong() -> None:
            for sending in (first, not first):
                if sending:
                    dist.send(x, partner)
                else:
                    dist.recv(y, partner)

        return x.numel() * BYTES_PER_ELEMENT, ping_pong

    def _collective(self, collective: Collective, group_size: int, message_bytes: int) -> tuple[int, Call]:
        group = self.groups[group_size]
        elements = max(1, message_bytes // BYTES_PER_ELEMENT // group_size) * group_size
        if collective == "all_to_all":  # message_bytes leave the rank; its own share stays
            elements = max(1, message_bytes // BYTES_PER_ELEMENT // (group_size - 1)) * group_size
        whole, share = self._tensor(elements), self._tensor(elements // group_size)
        handed = BYTES_PER_ELEMENT * elements
        match collective:
            case "all_to_all":
                received = torch.empty_like(whole)
                call = functools.partial(dist.all_to_all_single, received, whole, group=group)
                return handed * (group_size - 1) // group_size, call
            case "all_reduce":
                return handed, functools.partial(dist.all_reduce, whole, group=group)
            case "all_gather":
                return handed, functools.partial(_ALL_GATHER, whole, share, group=group)
            case "reduce_scatter":
                return handed, functools.partial(_REDUCE_SCATTER, share, whole, group=group)
        raise ValueError(f"{collective} is not a collective of a group")

    def _tensor(self, elements: int) -> torch.Tensor:
        return torch.zeros(max(1, elements), device=self.device)


# Their names since PyTorch 2.13, and before.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

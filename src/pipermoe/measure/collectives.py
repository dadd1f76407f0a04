"""All ranks measure their network: collectives of several sizes in groups of several sizes, latency and bandwidth."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipermoe.measure.clock import Call, Clock, wall_seconds
from pipermoe.measure.samples import Point, summarize
from pipermoe.measure.sizes import BYTES_PER_ELEMENT, Effort
from pipermoe.specs.network import COLLECTIVES, Collective

FEWEST_CALLS, MOST_CALLS = 5, 40
SKEW = 3  # in the uneven all-to-all one rank receives this many times what the others do


@dataclass(frozen=True, slots=True)
class Grouping:
    """All ranks divided into groups of `size` that work at once: every `stride`-th rank, on a level of the network."""

    level: str
    size: int
    stride: int = 1
    whole: bool = False  # the group holds all ranks of the level

    def members(self, rank: int) -> list[int]:
        """The group that `rank` belongs to."""
        block, place = divmod(rank, self.size * self.stride)
        first = block * self.size * self.stride + place % self.stride
        return list(range(first, first + self.size * self.stride, self.stride))


def groupings(ranks: int, ranks_per_host: int) -> list[Grouping]:
    """The groups that are measured, level by level from the innermost.

    On a host: every power of two that divides its ranks. Between hosts: one rank of each host, and whole hosts in
    powers of two.
    """
    hosts = ranks // ranks_per_host
    inside = "host" if hosts == 1 else "node"
    found = [Grouping(inside, size) for size in _powers_below(ranks_per_host)]
    if ranks_per_host > 1:
        found.append(Grouping(inside, ranks_per_host, whole=True))
    if hosts > 1:
        found += [Grouping("system", hosts, ranks_per_host)] if ranks_per_host > 1 else []
        sizes = [n * ranks_per_host for n in _powers_below(hosts)]
        found += [Grouping("system", size) for size in sizes if size != hosts]
        found.append(Grouping("system", ranks, whole=True))
    return found


def _powers_below(count: int) -> list[int]:
    """Powers of two from 2 that divide `count` and are less."""
    return [2**n for n in range(1, count.bit_length()) if 2**n < count and count % 2**n == 0]


class Network:
    """One rank's groups and its device, and calls on them."""

    def __init__(self, device: torch.device, ranks_per_host: int, effort: Effort, clock: Clock) -> None:
        self.device, self.effort, self.clock = device, effort, clock
        self.rank, self.ranks, self.ranks_per_host = dist.get_rank(), dist.get_world_size(), ranks_per_host
        self.groupings = groupings(self.ranks, ranks_per_host)
        self.groups = {grouping: self._own_group(grouping) for grouping in self.groupings}

    def _own_group(self, grouping: Grouping) -> dist.ProcessGroup:
        """The group of this rank; every rank must create every group, in the same order."""
        everyone = dict.fromkeys(tuple(grouping.members(rank)) for rank in range(self.ranks))
        groups = {members: dist.new_group(list(members)) for members in everyone}
        group = groups[tuple(grouping.members(self.rank))]
        assert isinstance(group, dist.ProcessGroup)
        return group

    def on_host(self) -> list[Grouping]:
        """The groupings on the innermost level."""
        return [grouping for grouping in self.groupings if grouping.level == self.groupings[0].level]

    def meet(self, grouping: Grouping) -> None:
        """The smallest all-to-all."""
        group = self.groups[grouping]
        x = self._tensor(group.size())
        dist.all_to_all_single(torch.empty_like(x), x, group=group)

    def measure(self, grouping: Grouping) -> dict[str, list[Point]]:
        """`LEVEL.COLLECTIVE.SIZE` of every collective; on a whole level also `LEVEL.send` and an uneven all-to-all.

        Seconds of one call that hands so many bytes to the network, as `LinkCost` counts them.
        """
        points: dict[str, list[Point]] = {}

        def keep(key: str, point: Point | None) -> None:
            if point:
                points.setdefault(f"{grouping.level}.{key}", []).append(point)

        for message_bytes in self.effort.message_bytes:
            for collective in COLLECTIVES:
                if collective != "send":
                    handed, call = self._collective(collective, self.groups[grouping], message_bytes)
                    keep(f"{collective}.{grouping.size}", self._timed(call, handed))
                elif grouping.whole:
                    handed, ping_pong = self._send(grouping, message_bytes)
                    keep("send", self._timed(ping_pong, handed, calls_per_message=2))
        if grouping.whole:
            keep("all_to_all_skew", self._skewed_all_to_all(self.groups[grouping], self.effort.message_bytes[-2]))
        return points

    def _skewed_all_to_all(self, group: dist.ProcessGroup, message_bytes: int) -> Point | None:
        """An all-to-all in which everyone sends `SKEW` shares to rank 0; `size` is the most bytes a rank receives."""
        ranks, others = group.size(), group.size() - 1
        share = max(1, message_bytes // BYTES_PER_ELEMENT // (SKEW + others - 1))
        sends = [share * (SKEW if peer == 0 else 1) for peer in range(ranks)]
        receives = [share * (SKEW if group.rank() == 0 else 1)] * ranks
        x, y = self._tensor(sum(sends)), self._tensor(sum(receives))
        call = functools.partial(dist.all_to_all_single, y, x, receives, sends, group=group)
        return self._timed(call, BYTES_PER_ELEMENT * share * max(SKEW * others, SKEW + others - 1))

    def _timed(self, call: Call | None, handed_bytes: int, calls_per_message: int = 1) -> Point | None:
        """Every rank makes the same number of calls, agreed on by the slowest; each call keeps the ranks in step.

        None on a rank without a partner ("send" with an odd number of ranks).
        """
        dist.barrier()
        estimate = torch.tensor([wall_seconds(call, 2) / 2 if call else 0.0], device=self.device)
        dist.all_reduce(estimate, op=dist.ReduceOp.MAX)
        calls = min(MOST_CALLS, max(FEWEST_CALLS, round(self.effort.message_seconds / max(float(estimate), 1e-6))))
        if call is None:
            return None
        samples = summarize([self.clock(call, 1) / calls_per_message for _ in range(calls)])
        return Point(
            handed_bytes, handed_bytes, samples.seconds, round(samples.spread, 4), samples.kept, samples.dropped
        )

    def _send(self, grouping: Grouping, message_bytes: int) -> tuple[int, Call | None]:
        """A message to the neighbour and one back, all pairs at once; half of it is one message.

        The neighbour is the next rank, on the outer level the same rank of the next host.
        """
        apart = self.ranks_per_host if grouping.level == "system" else 1
        first = self.rank // apart % 2 == 0
        partner = self.rank + apart if first else self.rank - apart
        if partner not in grouping.members(self.rank):
            return 0, None
        x, y = self._tensor(message_bytes // BYTES_PER_ELEMENT), self._tensor(message_bytes // BYTES_PER_ELEMENT)

        def ping_pong() -> None:
            for sending in (first, not first):
                if sending:
                    dist.send(x, partner)
                else:
                    dist.recv(y, partner)

        return x.numel() * BYTES_PER_ELEMENT, ping_pong

    def _collective(self, collective: Collective, group: dist.ProcessGroup, message_bytes: int) -> tuple[int, Call]:
        group_size = group.size()
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

"""Plans by torch.distributed's point-to-point: on any backend, and in groups of sends and receives on NCCL and RCCL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipermoe.exchange.host.program import Program, Range, Transfer, Way, lower
from pipermoe.exchange.plan import ExchangePlan
from pipermoe.exchange.topology import Topology
from pipermoe.specs.errors import MachineError

TAG = 0x7A2A  # of all messages of exchanges, apart from those of the user


class ProcessGroupTransport:
    """Receives are posted first, so that a sender finds its receiver ready; a send starts when its inputs are there."""

    name = "process_group"

    def __init__(self, group: dist.ProcessGroup, topology: Topology, timeout: float):
        self.group, self.topology, self.limit = group, topology, timedelta(seconds=timeout)

    def prepare(self, plan: ExchangePlan) -> Program:
        return lower(plan, self.group.rank(), self.topology, Way.GROUP, Way.GROUP)

    def run(self, prepared: Program, buffers: Sequence[torch.Tensor]) -> None:
        try:
            self._run(prepared, [as_bytes(buffer) for buffer in buffers])
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise MachineError(f"rank {prepared.rank}: {reason}") from error

    def _run(self, program: Program, buffers: Sequence[torch.Tensor]) -> None:
        under_way: dict[int, tuple[Any, torch.Tensor, Transfer | None]] = {}  # message -> work, its bytes, receive

        def finish(message: int) -> None:
            if message in under_way:  # else it has been finished, or was a copy
                work, wire, receive = under_way.pop(message)
                work.wait(self.limit)
                if receive is not None and len(receive.ranges) > 1:
                    scatter(wire, pieces(buffers, receive.ranges))

        for receive in program.receives:
            wire = landing(buffers, receive)
            under_way[receive.message] = self.group.recv([wire], receive.peer, TAG), wire, receive
        for send in program.sends:
            for message in send.waits:
                finish(message)
            wire = gathered(buffers, send)
            if send.way == Way.COPY:
                scatter(wire, pieces(buffers, send.copied_to))
            else:
                under_way[send.message] = self.group.send([wire], send.peer, TAG), wire, None
        for message in list(under_way):
            finish(message)

    def close(self) -> None:
        """Nothing of its own is open."""


class DeviceTransport:
    """For NCCL and RCCL: every level of a plan's dependencies is one group of sends and receives.

    All groups queue on the current stream, so a level starts on the device when its inputs are there.
    """

    name = "device"

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def prepare(self, plan: ExchangePlan) -> list[list[tuple[bool, Transfer]]]:
        """The (is a send, transfer) of every level."""
        program = lower(plan, self.group.rank(), Topology.even(plan.num_ranks), Way.GROUP, Way.GROUP)
        levels: list[list[tuple[bool, Transfer]]] = [[] for _ in range(int(plan.level.max(initial=-1)) + 1)]
        ends = [(False, receive) for receive in program.receives] + [(True, send) for send in program.sends]
        for sends, transfer in sorted(ends, key=lambda end: end[1].message):
            levels[int(plan.level[transfer.message])].append((sends, transfer))
        return levels

    def run(self, prepared: list[list[tuple[bool, Transfer]]], buffers: Sequence[torch.Tensor]) -> None:
        buffers = [as_bytes(buffer) for buffer in buffers]
        for level in prepared:
            operations, arrivals = [], []
            for sends, transfer in level:
                if transfer.way == Way.COPY:
                    scatter(gathered(buffers, transfer), pieces(buffers, transfer.copied_to))
                    continue
                wire = gathered(buffers, transfer) if sends else landing(buffers, transfer)
                call = dist.isend if sends else dist.irecv
                operations.append(dist.P2POp(call, wire, group=self.group, group_peer=transfer.peer, tag=TAG))
                if not sends and len(transfer.ranges) > 1:
                    arrivals.append((wire, transfer.ranges))
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()
            for wire, ranges in arrivals:
                scatter(wire, pieces(buffers, ranges))

    def close(self) -> None:
        """Nothing of its own is open."""


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as bytes."""
    return tensor.detach().view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)


def pieces(buffers: Sequence[torch.Tensor], ranges: Sequence[Range]) -> list[torch.Tensor]:
    return [buffers[buffer][offset : offset + length] for buffer, offset, length in ranges]


def gathered(buffers: Sequence[torch.Tensor], send: Transfer) -> torch.Tensor:
    """The bytes of a message, without a copy where they lie in one piece."""
    parts = pieces(buffers, send.ranges)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def landing(buffers: Sequence[torch.Tensor], receive: Transfer) -> torch.Tensor:
    """Where the bytes of a message arrive: their place if it is one piece, else a buffer to scatter from."""
    parts = pieces(buffers, receive.ranges)
    return parts[0] if len(parts) == 1 else parts[0].new_empty(receive.length)


def scatter(wire: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    for part, arrived in zip(parts, wire.split([part.numel() for part in parts]), strict=True):
        part.copy_(arrived)

"""One rank's part of an exchange plan, ready to run: what it receives, what it sends and what each send waits for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipermoe.exchange.plan import ExchangePlan, Ints
from pipermoe.exchange.topology import Topology

Range = tuple[int, int, int]  # buffer, offset, length
ALIGNMENT = 64  # bytes: a cache line, so that two ranks never write the same one


@dataclass(frozen=True, slots=True)
class Transfer:
    """This rank's end of one message. `waits` are earlier messages of this rank; `slot` its place in shared memory.

    A copy inside the rank has the ranges of both ends. `slot` is -1 for a message that crosses the network.
    """

    message: int
    peer: int
    length: int
    ranges: tuple[Range, ...]
    waits: tuple[int, ...] = ()
    slot: int = -1
    copied_to: tuple[Range, ...] = ()
    by_socket: bool = False  # crosses the network over a socket of our own, not the process group


@dataclass(frozen=True, slots=True)
class Program:
    """Run it thus: post all receives; for each send in order complete what it waits for, then start it; complete all.

    It cannot block for ever: it waits only for messages with smaller numbers than the ones it has not started.
    """

    rank: int
    input_bytes: int
    output_bytes: int
    staging_bytes: int
    receives: tuple[Transfer, ...]
    sends: tuple[Transfer, ...]
    shared_bytes: int  # of shared memory that the node of this rank needs

    @property
    def network_bytes_sent(self) -> int:
        return sum(send.length for send in self.sends if send.slot < 0 and not send.copied_to)


def lower(plan: ExchangePlan, rank: int, topology: Topology | None = None, socket_bytes: int = 0) -> Program:
    """The program of `rank`. With a topology, messages inside a node pass through shared memory slots.

    Those of a pair of ranks that exchanges at most `socket_bytes` in all over the network go by socket.
    """
    slots, shared_bytes = _slots(plan, rank, topology)
    pair = plan.source * plan.num_ranks + plan.destination
    by_socket = np.bincount(pair, plan.message_bytes, plan.num_ranks**2)[pair] <= socket_bytes
    receives, sends = [], []
    length = plan.message_bytes
    for m in np.flatnonzero((plan.source == rank) | (plan.destination == rank)).tolist():
        here = slice(plan.first_fragment[m], plan.first_fragment[m + 1])
        source, destination = int(plan.source[m]), int(plan.destination[m])
        slot = slots.get(m, -1)
        if source == rank:
            transfer = Transfer(
                m,
                destination,
                int(length[m]),
                _ranges(plan.fragments.source_buffer, plan.fragments.source_offset, plan.fragments.length, here),
                tuple(plan.dependencies_of(m).tolist()),
                slot,
                _written(plan, here) if destination == rank else (),
                by_socket=bool(by_socket[m]) and slot < 0 and destination != rank,
            )
            sends.append(transfer)
        else:
            place = _written(plan, here)
            receives.append(
                Transfer(m, source, int(length[m]), place, slot=slot, by_socket=bool(by_socket[m]) and slot < 0)
            )
    return Program(
        rank,
        int(plan.counts[rank].sum()),
        int(plan.counts[:, rank].sum()),
        int(plan.staging_bytes[rank]),
        tuple(receives),
        tuple(sends),
        shared_bytes,
    )


def _ranges(buffer: Ints, offset: Ints, length: Ints, here: slice) -> tuple[Range, ...]:
    return tuple(zip(buffer[here].tolist(), offset[here].tolist(), length[here].tolist(), strict=True))


def _written(plan: ExchangePlan, here: slice) -> tuple[Range, ...]:
    """Where the fragments go, those that touch joined: a packed message often lands in one piece."""
    joined: list[Range] = []
    f = plan.fragments
    for buffer, offset, length in _ranges(f.destination_buffer, f.destination_offset, f.length, here):
        if joined and joined[-1][0] == buffer and joined[-1][1] + joined[-1][2] == offset:
            joined[-1] = (buffer, joined[-1][1], joined[-1][2] + length)
        else:
            joined.append((buffer, offset, length))
    return tuple(joined)


def _slots(plan: ExchangePlan, rank: int, topology: Topology | None) -> tuple[dict[int, int], int]:
    """Offsets in the node's shared memory of the messages between its ranks: equal on all of them."""
    if topology is None:
        return {}, 0
    node = topology.node_of
    mine = node[rank]
    inside = (node[plan.source] == mine) & (node[plan.destination] == mine) & (plan.source != plan.destination)
    messages = np.flatnonzero(inside)
    size = -(-plan.message_bytes[messages] // ALIGNMENT) * ALIGNMENT
    end = np.cumsum(size)
    return dict(zip(messages.tolist(), (end - size).tolist(), strict=True)), int(end[-1]) if len(end) else 0

"""One rank's part of an exchange plan, ready to run: what it receives, what it sends and what each send waits for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from pipermoe.exchange.plan import ExchangePlan, Ints
from pipermoe.exchange.topology import Topology

Range = tuple[int, int, int]  # buffer, offset, length
ALIGNMENT = 64  # bytes: a cache line, so that two ranks never write the same one


class Way(IntEnum):
    """How a message goes from its source to its destination."""

    COPY = 0  # they are the same rank
    MEMORY = 1  # through a slot in the shared memory of their node
    SOCKET = 2
    GROUP = 3  # by the process group's own send and receive


@dataclass(frozen=True, slots=True)
class Transfer:
    """This rank's end of one message.

    `waits` are earlier messages of this rank: it starts when they have arrived, or left. `slot` is its place in shared
    memory, in its source's region. `copied_to` are the ranges of the other end where that is this rank, too.
    """

    message: int
    peer: int
    way: Way
    length: int
    ranges: tuple[Range, ...]
    waits: tuple[int, ...] = ()
    slot: int = -1
    copied_to: tuple[Range, ...] = ()


@dataclass(frozen=True)
class Program:
    """Run it thus: expect all receives; start every send as soon as all that it waits for has arrived or left.

    It cannot block for ever: a message waits only for messages with smaller numbers.
    """

    rank: int
    input_bytes: int
    output_bytes: int
    staging_bytes: int
    receives: tuple[Transfer, ...]
    sends: tuple[Transfer, ...]
    written_bytes: tuple[int, ...]  # into shared memory by each rank of the node

    @cached_property
    def socket_peers(self) -> set[int]:
        return {transfer.peer for transfer in (*self.sends, *self.receives) if transfer.way == Way.SOCKET}


def lower(plan: ExchangePlan, rank: int, topology: Topology, inside: Way, between: Way) -> Program:
    """The program of `rank`: messages inside a node go one way, those between nodes another.

    By memory and by socket, a message also waits until the one before it to the same peer has left.
    """
    slots, written_bytes = _slots(plan, rank, topology) if inside == Way.MEMORY else ({}, ())
    node = topology.node_of
    receives, sends = [], []
    last_to: dict[int, int] = {}
    length = plan.message_bytes
    for m in np.flatnonzero((plan.source == rank) | (plan.destination == rank)).tolist():
        here = slice(plan.first_fragment[m], plan.first_fragment[m + 1])
        source, destination = int(plan.source[m]), int(plan.destination[m])
        way = Way.COPY if source == destination else inside if node[source] == node[destination] else between
        if source == rank:
            waits = plan.dependencies_of(m).tolist()
            if way in (Way.MEMORY, Way.SOCKET):
                if destination in last_to and last_to[destination] not in waits:
                    waits.append(last_to[destination])
                last_to[destination] = m
            read = _ranges(plan.fragments.source_buffer, plan.fragments.source_offset, plan.fragments.length, here)
            copied_to = _written(plan, here) if way == Way.COPY else ()
            sends.append(Transfer(m, destination, way, int(length[m]), read, tuple(waits), slots.get(m, -1), copied_to))
        else:
            receives.append(Transfer(m, source, way, int(length[m]), _written(plan, here), slot=slots.get(m, -1)))
    return Program(
        rank,
        int(plan.counts[rank].sum()),
        int(plan.counts[:, rank].sum()),
        int(plan.staging_bytes[rank]),
        tuple(receives),
        tuple(sends),
        written_bytes,
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


def _slots(plan: ExchangePlan, rank: int, topology: Topology) -> tuple[dict[int, int], tuple[int, ...]]:
    """Offsets of the messages between the ranks of a node, each in its source's region, and the regions' bytes."""
    node = topology.node_of
    mine = node[rank]
    inside = (node[plan.source] == mine) & (node[plan.destination] == mine) & (plan.source != plan.destination)
    slots: dict[int, int] = {}
    written = []
    for source in topology.ranks_of_node[mine]:
        messages = np.flatnonzero(inside & (plan.source == source))
        size = -(-plan.message_bytes[messages] // ALIGNMENT) * ALIGNMENT
        slots.update(zip(messages.tolist(), (np.cumsum(size) - size).tolist(), strict=True))
        written.append(int(size.sum()))
    return slots, tuple(written)

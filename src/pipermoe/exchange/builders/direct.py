"""Every segment in one message, straight from source to destination; builders differ in order and window."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pipermoe.exchange.plan import (
    INPUT,
    OUTPUT,
    ExchangePlan,
    Fragments,
    Ints,
    assemble,
    byte_matrix,
    ranges,
    segment_offsets,
)
from pipermoe.exchange.topology import Topology


def direct(counts: ArrayLike, topology: Topology) -> ExchangePlan:
    """All messages at once, in rotation order: step k of rank r goes to r + k. What gloo and MPI's linear do."""
    return _straight("direct", byte_matrix(counts), rotation(topology.num_ranks), window=0)


def pairwise(counts: ArrayLike, topology: Topology, *, window: int = 1) -> ExchangePlan:
    """Rotation order with `window` steps in flight: MPI's pairwise with 1; NCCL's and RCCL's send-receive with 4 to 8.

    On a dragonfly it sends a whole group to one other group at a time, so one global link of G - 1 works.
    """
    return _straight("pairwise", byte_matrix(counts), rotation(topology.num_ranks), window)


def group_aware(counts: ArrayLike, topology: Topology, *, window: int = 0, chunk_bytes: int = 0) -> ExchangePlan:
    """Straight messages in an order that spreads every step over all groups, so all global links work all the time.

    Without a window it reaches the bound in simulation; windows of 1 and 4 reach 1.24 and 1.27 times the bound on 8
    groups of 8, where rotation takes 5.5 times. With `chunk_bytes` a rank addresses everyone with a first chunk before
    anyone gets a second: a NIC sends in the order of the posts, and a link starts when its first byte gets through.
    """
    order = group_interleaved(topology.group_of)
    return _straight("group_aware", byte_matrix(counts), order, window, chunk_bytes)


def rotation(num_ranks: int) -> Ints:
    """The step at which s addresses d, [P, P]: (d - s) mod P."""
    rank = np.arange(num_ranks)
    return (rank[None, :] - rank[:, None]) % num_ranks


def group_interleaved(group_of: Ints) -> Ints:
    """The step at which s addresses d, [P, P]; with equal groups every step is a permutation.

    Member j of group g sends in step (b, a) to group g + a + o(j), member j + b. The offsets o(j) spread the members of
    a group over the other groups, so the group's links start work at once and stay at it. Compare the source-vector
    rounds of the Swapped Dragonfly (Draper, arXiv 2202.01843).
    """
    groups = int(group_of.max()) + 1
    member = np.zeros_like(group_of)
    for g in range(groups):
        inside = group_of == g
        member[inside] = np.arange(inside.sum())
    size = int(member.max()) + 1
    offset = member * max(1, groups // size)
    ahead = (group_of[None, :] - group_of[:, None] - offset[:, None]) % groups
    return (member[None, :] - member[:, None]) % size * groups + ahead


def _straight(name: str, counts: Ints, step: Ints, window: int, chunk_bytes: int = 0) -> ExchangePlan:
    source, destination = np.nonzero(counts)
    before, above = segment_offsets(counts)
    length = counts[source, destination]
    chunks = -(-length // chunk_bytes) if chunk_bytes else np.ones_like(length)
    chunk = ranges(np.zeros_like(chunks), chunks)
    source, destination, length, chunks = (
        np.repeat(column, chunks) for column in (source, destination, length, chunks)
    )
    offset = length * chunk // chunks
    buffer = np.zeros(len(source), dtype=np.int64)
    fragments = Fragments(
        buffer + INPUT,
        before[source, destination] + offset,
        buffer + OUTPUT,
        above[source, destination] + offset,
        length * (chunk + 1) // chunks - offset,
    )
    return assemble(
        name,
        counts,
        ("straight",),
        source=source,
        destination=destination,
        phase=buffer,
        step=chunk * (int(step.max()) + 1) + step[source, destination],
        fragments=fragments,
        window=window,
    )

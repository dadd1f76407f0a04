"""The common core of node-level plans: pieces travel gather -> cross -> scatter by way of two carriers.

A piece is a range of one segment. On its way from rank s to rank d on another node it passes carrier a (a rank of the
node of s) and carrier b (a rank of the node of d). Pieces of one packet share a and b and cross the network side by
side in one message.

    inside    s -> d on one node, straight                              (HALO's phase I)
    gather    s -> a, into the packet in the staging of a               (part of phase II)
    cross     a -> b, the whole packet
    scatter   b -> d, from the packet in the staging of b to its place  (phase III)

HALO: Piper, arXiv 2605.05049; phase I runs beside II -> III.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipermoe.exchange.plan import (
    INPUT,
    OUTPUT,
    STAGING,
    ExchangePlan,
    Fragments,
    Ints,
    assemble,
    segment_offsets,
)
from pipermoe.exchange.topology import Topology

PHASES = ("gather", "cross", "inside", "scatter")
GATHER, CROSS, INSIDE, SCATTER = range(4)
Inside = Literal["straight", "carried"]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Columns of ranges of segments between nodes, sorted by (source node, destination node, source, destination)."""

    source: Ints
    destination: Ints
    offset: Ints  # of the piece in its segment
    length: Ints
    cut: Ints  # which cut of its node pair it belongs to


def cut_node_pairs(
    counts: Ints, topology: Topology, cuts: Ints, chunk_bytes: int = 0, *, with_inside: bool = False
) -> Pieces:
    """The segments between nodes, each node pair's bytes cut into `cuts[i, j]` equal parts, these into chunks.

    With `with_inside` the segments inside nodes, too.
    The bytes of a node pair are one stream, ordered by source and then destination rank; cuts ignore whose they are.
    A part longer than `chunk_bytes` (if positive) becomes several, numbered part * chunks + chunk.
    """
    node = topology.node_of
    source, destination = np.nonzero(counts if with_inside else counts * (node[:, None] != node[None, :]))
    order = np.lexsort((destination, source, node[destination], node[source]))
    source, destination = source[order], destination[order]
    length = counts[source, destination]
    start = np.cumsum(length) - length
    pair = node[source] * topology.num_nodes + node[destination]
    pairs, first = np.unique(pair, return_index=True)
    if not len(pairs):
        empty = np.zeros(0, dtype=np.int64)
        return Pieces(empty, empty, empty, empty, empty)
    total = np.add.reduceat(length, first)
    parts = cuts.ravel()[pairs]
    chunks = np.maximum(1, -(-total // (parts * chunk_bytes))) if chunk_bytes else np.ones_like(total)
    cuts_of_pair = parts * chunks
    row = np.repeat(np.arange(len(pairs)), cuts_of_pair)
    number = np.arange(len(row)) - np.repeat(np.cumsum(cuts_of_pair) - cuts_of_pair, cuts_of_pair)
    boundary = start[first][row] + total[row] * number // cuts_of_pair[row]

    begin = np.unique(np.concatenate([start, boundary]))
    begin = begin[begin < start[-1] + length[-1]]
    piece_length = np.diff(np.append(begin, start[-1] + length[-1]))
    segment = np.searchsorted(start, begin, side="right") - 1
    cut = np.searchsorted(boundary, begin, side="right") - 1
    return Pieces(source[segment], destination[segment], begin - start[segment], piece_length, number[cut])


def relay(
    name: str,
    counts: Ints,
    topology: Topology,
    pieces: Pieces,
    carrier: tuple[Ints, Ints],
    step: Ints,
    *,
    separate_inside: bool = True,
    inside: Inside = "straight",
) -> ExchangePlan:
    """The plan in which piece i crosses from carrier[0][i] to carrier[1][i], packets in the order of `step`.

    Without `separate_inside` what stays on the node travels with the gather: fewer messages, but the crossing waits
    for more bytes. With `inside` = "carried" the pieces hold the segments inside nodes, too.
    """
    a, b = carrier
    before, above = segment_offsets(counts)
    read_at = before[pieces.source, pieces.destination] + pieces.offset
    write_at = above[pieces.source, pieces.destination] + pieces.offset

    packet = np.unique(np.stack([a, b, step]), axis=1, return_inverse=True)[1].ravel()
    gathered = ~_all_in(packet, pieces.source == a)  # else every piece of the packet lies in the input of a
    scattered = ~_all_in(packet, pieces.destination == b)
    leaves, arrives = _stage(packet, a, b, pieces.length, gathered, scattered, topology.num_ranks)

    place = np.zeros(len(a), dtype=np.int64)
    gather = Fragments(place + INPUT, read_at, place + STAGING, leaves, pieces.length)
    cross = Fragments(
        np.where(gathered, STAGING, INPUT),
        np.where(gathered, leaves, read_at),
        np.where(scattered, STAGING, OUTPUT),
        np.where(scattered, arrives, write_at),
        pieces.length,
    )
    scatter = Fragments(place + STAGING, arrives, place + OUTPUT, write_at, pieces.length)
    s, d, straight = _inside(counts if inside == "straight" else np.zeros_like(counts), topology, before, above)
    crosses = np.lexsort((leaves, packet))  # so that a packet is one range of the staging at both ends
    parts = [
        (pieces.source[gathered], a[gathered], GATHER, step[gathered], gather[gathered]),
        (a[crosses], b[crosses], CROSS, step[crosses], cross[crosses]),
        (b[scattered], pieces.destination[scattered], SCATTER, step[scattered], scatter[scattered]),
        (s, d, INSIDE if separate_inside else GATHER, np.zeros(len(s), dtype=np.int64), straight),
    ]
    return assemble(
        name,
        counts,
        PHASES,
        source=np.concatenate([part[0] for part in parts]),
        destination=np.concatenate([part[1] for part in parts]),
        phase=np.concatenate([np.full(len(part[0]), part[2], dtype=np.int64) for part in parts]),
        step=np.concatenate([_step_of(part[2], part[3], separate_inside, inside) for part in parts]),
        fragments=Fragments.join([part[4] for part in parts]),
    )


def _step_of(phase: int, step: Ints, separate_inside: bool, inside: Inside) -> Ints:
    """One gather for all packets of a rank when it travels with the inside; one scatter, too, if that is carried."""
    together = (phase == GATHER and not separate_inside) or (phase == SCATTER and inside == "carried")
    return np.zeros_like(step) if together else step


def _all_in(packet: Ints, holds) -> np.ndarray:
    """For every piece whether `holds` for all pieces of its packet."""
    fails = np.bincount(packet, weights=~holds, minlength=int(packet.max(initial=-1)) + 1)
    return fails[packet] == 0


def _stage(packet: Ints, a: Ints, b: Ints, length: Ints, gathered, scattered, num_ranks: int):
    """Offsets in the staging of a and of b: packets side by side, first those that leave, then those that arrive."""
    used = np.zeros(num_ranks, dtype=np.int64)
    offsets = []
    for rank, staged in ((a, gathered), (b, scattered)):
        order = np.lexsort((packet, rank))
        size = np.where(staged, length, 0)[order]
        end = np.cumsum(size)
        per_rank = np.bincount(rank, weights=np.where(staged, length, 0), minlength=num_ranks).astype(np.int64)
        base = np.cumsum(per_rank) - per_rank
        offset = np.empty_like(length)
        offset[order] = end - size - base[rank[order]] + used[rank[order]]
        offsets.append(offset)
        used += per_rank
    return offsets[0], offsets[1]


def _inside(counts: Ints, topology: Topology, before: Ints, above: Ints) -> tuple[Ints, Ints, Fragments]:
    node = topology.node_of
    s, d = np.nonzero(counts * (node[:, None] == node[None, :]))
    place = np.zeros(len(s), dtype=np.int64)
    return s, d, Fragments(place + INPUT, before[s, d], place + OUTPUT, above[s, d], counts[s, d])

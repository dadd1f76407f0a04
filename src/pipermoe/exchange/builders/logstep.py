"""Log-step: ceil(log2 P) rounds of store and forward, the fewest messages per rank of all."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pipermoe.exchange.plan import (
    INPUT,
    OUTPUT,
    STAGING,
    ExchangePlan,
    Fragments,
    assemble,
    byte_matrix,
    segment_offsets,
)
from pipermoe.exchange.topology import Topology


def log_step(counts: ArrayLike, topology: Topology) -> ExchangePlan:
    """Round t: every rank h sends to h + 2^t all that still has bit t to go (Bruck et al. 1997, uneven counts allowed).

    A segment from s to d travels the set bits of (d - s) mod P, lowest first, so it moves popcount times.
    """
    counts = byte_matrix(counts)
    num_ranks = len(counts)
    before, above = segment_offsets(counts)
    s, d = np.nonzero(counts)
    length = counts[s, d]
    distance = (d - s) % num_ranks
    rounds = max(1, (num_ranks - 1).bit_length())
    buffer, offset = np.full(len(s), INPUT), before[s, d]
    used = np.zeros(num_ranks, dtype=np.int64)

    stay = distance == 0
    columns = [(s[stay], d[stay], 0, _fragments(buffer[stay], offset[stay], OUTPUT, above[s, d][stay], length[stay]))]
    for t in range(rounds):
        moves = (distance >> t) & 1 == 1
        here = (s + (distance & ((1 << t) - 1))) % num_ranks
        there = (here + (1 << t)) % num_ranks
        ends = moves & (distance >> (t + 1) == 0)
        waits = moves & ~ends
        slot = np.zeros(len(s), dtype=np.int64)
        order = np.flatnonzero(waits)[np.lexsort((d[waits], s[waits], there[waits]))]
        filled = np.cumsum(length[order]) - length[order]
        starts = np.searchsorted(there[order], there[order], side="left")
        slot[order] = used[there[order]] + filled - filled[starts] if len(order) else slot[order]
        np.add.at(used, there[order], length[order])
        target = np.where(ends, above[s, d], slot)
        to = np.where(ends, OUTPUT, STAGING)
        part = _fragments(buffer[moves], offset[moves], to[moves], target[moves], length[moves])
        columns.append((here[moves], there[moves], t, part))
        buffer, offset = np.where(moves, to, buffer), np.where(moves, target, offset)
    phase = np.concatenate([np.full(len(column[0]), column[2], dtype=np.int64) for column in columns])
    return assemble(
        "log_step",
        counts,
        tuple(f"+{1 << t}" for t in range(rounds)),
        source=np.concatenate([column[0] for column in columns]),
        destination=np.concatenate([column[1] for column in columns]),
        phase=phase,
        step=np.zeros_like(phase),
        fragments=Fragments.join([column[3] for column in columns]),
    )


def _fragments(source_buffer, source_offset, destination_buffer, destination_offset, length) -> Fragments:
    return Fragments(
        source_buffer,
        source_offset,
        np.broadcast_to(destination_buffer, length.shape).copy(),
        destination_offset,
        length,
    )

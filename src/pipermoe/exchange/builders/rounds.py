"""Balanced rounds for skewed counts: the byte matrix as a sum of permutations, so no receiver is ever overrun."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pipermoe.exchange.plan import INPUT, OUTPUT, ExchangePlan, Fragments, Ints, assemble, byte_matrix, segment_offsets
from pipermoe.exchange.topology import Topology


def balanced_rounds(counts: ArrayLike, topology: Topology, *, window: int = 2) -> ExchangePlan:
    """Rounds in which every rank sends to at most one and receives from at most one, `window` of them in flight.

    A rank with the largest row or column sum is busy in every round, so the rounds together last as long as the bound
    max(row sum, column sum) (Birkhoff - von Neumann; FAST, arXiv 2505.09764).
    """
    counts = byte_matrix(counts)
    before, above = segment_offsets(counts)
    own = np.diag(counts)
    between = counts - np.diag(own)
    rounds = decompose(between)
    rank = np.arange(len(counts))
    done = np.zeros_like(counts)
    parts = [(rank, rank, np.zeros_like(rank), np.zeros_like(rank), own)]
    for number, (destination, length) in enumerate(rounds):
        parts.append((rank, destination, np.full_like(rank, number), done[rank, destination], length))
        done[rank, destination] += length
    source, destination, step, offset, length = (np.concatenate(column) for column in zip(*parts, strict=True))
    place = np.zeros_like(source)
    fragments = Fragments(
        place + INPUT,
        before[source, destination] + offset,
        place + OUTPUT,
        above[source, destination] + offset,
        length,
    )
    return assemble(
        "balanced_rounds",
        counts,
        ("round",),
        source=source,
        destination=destination,
        phase=place,
        step=step,
        fragments=fragments,
        window=window,
    )


def decompose(matrix: Ints) -> list[tuple[Ints, Ints]]:
    """Rounds (destination [P], bytes [P]) that add up to `matrix`; a round's duration is its largest message.

    Slack fills the matrix up until all rows and columns have the largest sum. Then a perfect matching exists in every
    remainder; the one with the largest smallest entry (to within a factor of two) is taken off as a whole.
    """
    slack = _slack(matrix)
    left, rounds = matrix.copy(), []
    rank = np.arange(len(matrix))
    while left.any():
        filled = left + slack
        threshold = 1 << int(filled.max()).bit_length() - 1
        while (match := perfect_matching(filled >= threshold)) is None:
            threshold //= 2
        duration = filled[rank, match].min()
        sent = np.minimum(left[rank, match], duration)
        left[rank, match] -= sent
        slack[rank, match] -= duration - sent
        if sent.any():
            rounds.append((match, sent))
    return rounds


def _slack(matrix: Ints) -> Ints:
    """What to add so that all rows and columns sum to the largest of them (north-west corner rule)."""
    rows, columns = matrix.sum(axis=1), matrix.sum(axis=0)
    most = max(rows.max(), columns.max())
    rows, columns = most - rows, most - columns
    slack = np.zeros_like(matrix)
    i = j = 0
    while i < len(rows) and j < len(columns):
        amount = min(rows[i], columns[j])
        slack[i, j] += amount
        rows[i] -= amount
        columns[j] -= amount
        if rows[i] == 0:
            i += 1
        else:
            j += 1
    return slack


def perfect_matching(allowed: np.ndarray) -> Ints | None:
    """A column for every row such that all are distinct and allowed, or None (augmenting paths, Kuhn 1955)."""
    options = [np.flatnonzero(row).tolist() for row in allowed]
    row_of: dict[int, int] = {}

    def augment(row: int, seen: set[int]) -> bool:
        for column in options[row]:
            if column not in seen:
                seen.add(column)
                if column not in row_of or augment(row_of[column], seen):
                    row_of[column] = row
                    return True
        return False

    if not all(augment(row, set()) for row in range(len(options))):
        return None
    match = np.empty(len(options), dtype=np.int64)
    for column, row in row_of.items():
        match[row] = column
    return match

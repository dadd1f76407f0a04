"""Rows that agree in what a formula reads are of one kind: it is evaluated once for them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HASH_FACTOR = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: Knuth, TAOCP volume 3, section 6.4
HASH_BITS = 16
FEW = 1 << 12  # rows that are sorted faster
BLOCK = 1 << 15  # rows; a block and the slots stay in the cache


class Kinds(NamedTuple):
    """`rows[k]` is a row of kind k, `of[i]` the kind of row i."""

    rows: NDArray[np.int64]
    of: NDArray[np.int64]


def distinct(columns: Sequence[NDArray]) -> Kinds:
    """The kinds of rows that differ in `columns`, whose entries are at least 0."""
    code, used = np.zeros(len(columns[0]), dtype=np.int64), 0
    for column in columns:
        bits = int(column.max()).bit_length()
        if used + bits > 63:
            kinds, code = _kinds(code)
            used = len(kinds).bit_length()
        if bits:
            code <<= bits
            code |= column
            used += bits
    return _kinds(code)


def _kinds(code: NDArray[np.int64]) -> Kinds:
    """One row of each kind of `code`, and the kind of every row: of many rows by a hash table instead of a sort.

    A slot belongs to one of the codes that reach it first; rows with another code in its slot try again elsewhere.
    """
    if len(code) < FEW:
        _, rows, of = np.unique(code, return_index=True, return_inverse=True)
        return Kinds(rows, of)
    kind = np.empty(len(code), dtype=np.int64)
    chosen: list[NDArray] = []
    pending, known, factor = np.arange(len(code)), 0, HASH_FACTOR
    while len(pending):
        mine = code[pending] if known else code
        slot, owner, agrees = _slots(mine, np.uint64(factor))
        taken = np.flatnonzero(owner >= 0)
        number = np.empty(len(owner), dtype=np.int64)
        number[taken] = np.arange(known, known + len(taken))
        kind[pending] = number[slot]
        chosen.append(pending[owner[taken]])
        pending, known, factor = pending[~agrees], known + len(taken), factor * HASH_FACTOR % (1 << 64)
    return Kinds(np.concatenate(chosen), kind)


def _slots(code: NDArray[np.int64], factor: np.uint64) -> tuple[NDArray, NDArray, NDArray[np.bool_]]:
    """The slot of every row, the row that owns each slot (-1: none), and which rows have the code of their owner."""
    owner, held = np.full(1 << HASH_BITS, -1), np.empty(1 << HASH_BITS, dtype=np.int64)
    slot, agrees = np.empty(len(code), dtype=np.int64), np.empty(len(code), dtype=bool)
    for start in range(0, len(code), BLOCK):
        rows = slice(start, start + BLOCK)
        mine = code[rows]
        here = ((mine.view(np.uint64) * factor) >> np.uint64(64 - HASH_BITS)).view(np.int64)
        free = np.flatnonzero(owner[here] < 0)
        owner[here[free]] = start + free
        held[here[free]] = code[owner[here[free]]]
        slot[rows], agrees[rows] = here, held[here] == mine
    return slot, owner, agrees

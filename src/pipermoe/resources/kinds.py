"""Rows that agree in what a formula reads are of one kind: it is evaluated once for them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CODE_LIMIT = 1 << 62
TABLE_ROOM = 4  # a table of all codes may have so many places for every row

Columns = Sequence[NDArray[np.integer]]


class Kinds(NamedTuple):
    """`rows[k]` is a row of kind k, `of[i]` the kind of row i."""

    rows: NDArray[np.int64]
    of: NDArray[np.int64]

    def within(self, outer: Kinds) -> Kinds:
        """The kinds of the rows that `outer` divides into the rows of this one."""
        return Kinds(outer.rows[self.rows], self.of[outer.of])


def distinct(columns: Columns) -> Kinds:
    """The kinds of rows that differ in `columns`, sorted by them, the first before all others."""
    differs = begins(columns)
    if 2 * np.count_nonzero(differs) > len(differs):
        return _kinds(columns)
    alike = _runs(differs)
    return _kinds([column[alike.rows] for column in columns]).within(alike)


def runs(columns: Columns) -> Kinds:
    """The same where rows that agree lie side by side; where they do not, a kind comes more than once."""
    return _runs(begins(columns))


def begins(columns: Columns) -> NDArray[np.bool_]:
    """Which rows differ from the one before."""
    found = np.zeros(len(columns[0]), dtype=bool)
    found[:1] = True
    later = found[1:]
    for column in columns:
        later |= column[1:] != column[:-1]
    return found


def _runs(differs: NDArray[np.bool_]) -> Kinds:
    starts = np.flatnonzero(differs)
    return Kinds(starts, np.repeat(np.arange(len(starts)), np.diff(starts, append=len(differs))))


def _kinds(columns: Columns) -> Kinds:
    """Rows are numbered by all columns in turn: by a table of the codes so far while it is small, then by sorting."""
    code, size = np.zeros(len(columns[0]), dtype=np.int8), 1
    room = TABLE_ROOM * len(code)
    for column in columns:
        least = int(column.min())
        values = int(column.max()) - least + 1
        if size > 1 and size * values > (room if size <= room else CODE_LIMIT):
            kinds = _numbered(code, size, room)
            code, size = kinds.of, len(kinds.rows)
        if values > 1:
            size *= values
            code = code.astype(np.min_scalar_type(-size - 1)) * values + (column - least)
    return _numbered(code, size, room)


def _numbered(code: NDArray[np.integer], size: int, room: int) -> Kinds:
    """The kinds of codes below `size`, in order; by a table if that has room."""
    code = code.astype(np.int64)
    if size <= room:
        known = np.zeros(size, dtype=bool)
        known[code] = True
        of = (np.cumsum(known) - 1).take(code)
        rows = np.empty(np.count_nonzero(known), dtype=np.int64)
        rows[of] = np.arange(len(code))
        return Kinds(rows, of)
    order = np.argsort(code)
    alike = runs([code[order]])
    of = np.empty_like(order)
    of[order] = alike.of
    return Kinds(order[alike.rows], of)

"""Rows that agree in what a formula reads are of one kind: it is evaluated once for them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CODE_BITS = 63
BLOCK = 1 << 15  # rows that stay in the cache


class Kinds(NamedTuple):
    """`rows[k]` is the first row of kind k, `of[i]` the kind of row i; kinds are in the order of their first rows."""

    rows: NDArray[np.int64]
    of: NDArray[np.int64]


def distinct(columns: Sequence[NDArray]) -> Kinds:
    """The kinds of rows that differ in `columns`, whose entries are at least 0."""
    held, widths = [], []
    for column in columns:
        bits = int(column.max()).bit_length()
        if sum(widths) + bits > CODE_BITS:
            kinds = _kinds(_codes(held, widths), sum(widths))
            held, widths = [kinds.of], [len(kinds.rows).bit_length()]
        if bits or not held:
            held.append(column)
            widths.append(bits)
    return _kinds(_codes(held, widths), sum(widths))


def _codes(columns: Sequence[NDArray], widths: Sequence[int]) -> NDArray[np.int64]:
    """The bits of all columns, one beside the other: (rows,)."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    for start in range(0, len(code), BLOCK):
        mine = code[start : start + BLOCK]
        for column, bits in zip(columns, widths, strict=True):
            mine <<= bits
            mine |= column[start : start + BLOCK]
    return code


def _kinds(code: NDArray[np.int64], bits: int) -> Kinds:
    """The kinds of codes below 2^bits. Tables hold rows that agree side by side: of each run one is looked at."""
    starts = _run_starts(code)
    runs = code[starts]
    first, of = _by_table(runs, bits) if 1 << bits <= len(runs) else _by_sort(runs)
    return Kinds(starts[first], np.repeat(of, np.diff(starts, append=len(code))))


def _by_table(code: NDArray[np.int64], bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first of each kind of code, in order, and the kind of each: by a table of all codes below 2^bits."""
    place = np.full(1 << bits, -1)
    place[code[::-1]] = np.arange(len(code))[::-1]  # of equal ones the last stays
    first = np.sort(place[place >= 0])
    place[code[first]] = np.arange(len(first))
    return first, place[code]


def _by_sort(code: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same of codes that are too large for a table."""
    order = np.argsort(code)
    bounds = _run_starts(code[order])
    first = np.minimum.reduceat(order, bounds)
    by_first = np.argsort(first)
    number, of = np.empty_like(first), np.empty_like(order)
    number[by_first] = np.arange(len(first))
    of[order] = np.repeat(number, np.diff(bounds, append=len(order)))
    return first[by_first], of


def _run_starts(code: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where codes differ from the one before."""
    return np.flatnonzero(np.concatenate([[True], code[1:] != code[:-1]]))

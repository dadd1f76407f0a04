"""Spill: copies for one micro-batch, made once the exact counts are known, for the rows that a rank has too many.

As in least-loaded expert parallelism (LLEP, arXiv 2601.17111): homes stay, and the overflow of a rank above `slack`
times the mean is computed elsewhere by ephemeral copies, whose gradients return home. Exact balance takes about a copy
per rank; a tenth of slack a quarter of them.
"""

# N ranks, S slots of a rank, E logical experts

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import EMPTY


@dataclass(frozen=True, slots=True)
class Ephemeral:
    """`destination` computes `rows` rows of `expert` for `source` with a copy that it drops afterwards."""

    expert: int
    source: int
    destination: int
    rows: int


def spill(
    slots_NS: NDArray[np.int64], rows_NS: NDArray[np.int64], *, slack: float = 1.0, least_rows: int = 1
) -> tuple[Ephemeral, ...]:
    """The ephemeral copies after which no rank has more than `slack` (at least 1) times the mean of rows, rounded up.

    From the busiest rank to the idlest, of the expert that it has the most rows of. Fewer than `least_rows` rows are
    not worth a copy: they stay.
    """
    if slack < 1:
        raise ValueError(f"slack = {slack}: must be at least 1, which is exact balance")
    load_N, left_NS = rows_NS.sum(1), np.where(slots_NS == EMPTY, 0, rows_NS)
    limit = math.ceil(slack * load_N.sum() / len(load_N))
    copies: dict[tuple[int, int, int], int] = {}
    while True:
        hot, cold = int(load_N.argmax()), int(load_N.argmin())
        slot = int(left_NS[hot].argmax())
        rows = int(min(load_N[hot] - limit, limit - load_N[cold], left_NS[hot, slot]))
        if rows < max(least_rows, 1):
            return tuple(Ephemeral(*place, rows) for place, rows in copies.items())
        place = (int(slots_NS[hot, slot]), hot, cold)
        copies[place] = copies.get(place, 0) + rows
        left_NS[hot, slot] -= rows
        load_N[hot] -= rows
        load_N[cold] += rows


def load_after(rows_NS: NDArray[np.int64], copies: tuple[Ephemeral, ...]) -> NDArray[np.int64]:
    """Rows of every rank, (N,), once the ephemeral copies have taken theirs."""
    load_N = rows_NS.sum(1)
    for copy in copies:
        load_N[copy.source] -= copy.rows
        load_N[copy.destination] += copy.rows
    return load_N

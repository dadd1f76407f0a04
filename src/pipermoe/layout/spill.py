"""Spill: copies for one micro-batch, made once the exact counts are known, for the rows that a rank has too many.

As in least-loaded expert parallelism (LLEP, arXiv 2601.17111): homes stay, and the overflow of a rank above `slack`
times the mean is computed elsewhere by ephemeral copies, whose gradients return home. Exact balance takes about a copy
per rank; a tenth of slack a quarter of them.
"""

# N ranks, S slots of a rank, G guest slots of a rank, X = S + G, E logical experts

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import EMPTY
from pipermoe.layout.transfer import Move


@dataclass(frozen=True, slots=True)
class SpillRule:
    """No rank has more than `slack` times the mean of rows, rounded up. Fewer than `least_rows` rows are not worth a
    copy, and a rank takes at most `most_copies` (None: any number): what that leaves over stays where it is.
    """

    slack: float = 1.0
    least_rows: int = 1
    most_copies: int | None = None

    def __post_init__(self) -> None:
        if self.slack < 1:
            raise ValueError(f"slack = {self.slack}: must be at least 1, which is exact balance")
        if self.least_rows < 1:
            raise ValueError(f"least_rows = {self.least_rows}: must be at least 1")


@dataclass(frozen=True, slots=True)
class Ephemeral:
    """`destination` computes `rows` rows of `expert` for `source` with a copy that it drops afterwards."""

    expert: int
    source: int
    destination: int
    rows: int


def spill(slots_NS: NDArray[np.int64], rows_NS: NDArray[np.int64], rule: SpillRule) -> tuple[Ephemeral, ...]:
    """The ephemeral copies after which ranks have the rows that `rule` asks for.

    From the busiest rank to the idlest, of the expert that it has the most rows of. No rank has an expert twice.
    """
    load_N, left_NS = rows_NS.sum(1), np.where(slots_NS == EMPTY, 0, rows_NS)
    limit = math.ceil(rule.slack * load_N.sum() / len(load_N))
    most = slots_NS.size if rule.most_copies is None else rule.most_copies
    taken: list[set[int]] = [set() for _ in load_N]  # the experts that visit each rank
    copies: dict[tuple[int, int, int], int] = {}
    while True:
        hot = int(load_N.argmax())
        slot = int(left_NS[hot].argmax())
        expert = int(slots_NS[hot, slot])
        room_N = np.array([len(guests) < most or expert in guests for guests in taken])
        cold = int(np.where(room_N, load_N, np.iinfo(np.int64).max).argmin())
        rows = int(min(load_N[hot] - limit, limit - load_N[cold], left_NS[hot, slot]))
        if rows < rule.least_rows or not room_N.any():
            return tuple(Ephemeral(*place, rows) for place, rows in copies.items())
        place = (expert, hot, cold)
        copies[place] = copies.get(place, 0) + rows
        taken[cold].add(expert)
        left_NS[hot, slot] -= rows
        load_N[hot] -= rows
        load_N[cold] += rows


def load_after(rows_NS: NDArray[np.int64], copies: Sequence[Ephemeral]) -> NDArray[np.int64]:
    """Rows of every rank, (N,), once the ephemeral copies have taken theirs."""
    load_N = rows_NS.sum(1)
    for copy in copies:
        load_N[copy.source] -= copy.rows
        load_N[copy.destination] += copy.rows
    return load_N


def with_guests(
    slots_NS: NDArray[np.int64], rows_NS: NDArray[np.int64], copies: Sequence[Ephemeral]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(slots, rows of each), both (N, X): every rank's own slots, then those of its guests, as many as any rank has.

    A rank that has the expert already takes the rows in its own slot.
    """
    guests: dict[int, list[int]] = defaultdict(list)
    for copy in copies:
        if copy.expert not in slots_NS[copy.destination] and copy.expert not in guests[copy.destination]:
            guests[copy.destination].append(copy.expert)
    added = ((0, 0), (0, max(map(len, guests.values()), default=0)))
    slots_NX, rows_NX = np.pad(slots_NS, added, constant_values=EMPTY), np.pad(rows_NS, added)
    for rank, experts in guests.items():
        slots_NX[rank, slots_NS.shape[1] :][: len(experts)] = experts
    for copy in copies:
        rows_NX[copy.source, slots_NX[copy.source].tolist().index(copy.expert)] -= copy.rows
        rows_NX[copy.destination, slots_NX[copy.destination].tolist().index(copy.expert)] += copy.rows
    return slots_NX, rows_NX


def guest_moves(layer: int, slots_NX: NDArray[np.int64], slots: int, copies: Sequence[Ephemeral]) -> tuple[Move, ...]:
    """How the guests, behind the first `slots` of each rank, get there: each from the first rank that it relieves."""
    sources: dict[tuple[int, int], int] = {}
    for copy in copies:
        if copy.expert in slots_NX[copy.destination, slots:]:
            sources.setdefault((copy.destination, copy.expert), copy.source)
    return tuple(Move(layer, expert, source, rank) for (rank, expert), source in sources.items())

"""TokenSplit: which copy of an expert computes which rows. Whole rows, the same on every rank.

First how many rows every copy takes (evenly, or so that the busiest rank has the least), then from which sources: from
the rank itself before its node before the others.
"""

# P source ranks (the N ranks of the group), N ranks, S slots of a rank, E logical experts, C copies of one expert

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import EMPTY
from pipermoe.layout.policy import Nodes

SWEEPS = 50  # of water-filling: a handful is usual


class TokenSplit(Protocol):
    """How many of an expert's rows each of its copies takes."""

    def __call__(self, slots_NS: NDArray[np.int64], load_E: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of every slot, (N, S): those of the copies of an expert add up to its `load_E`."""
        ...


def even_split(slots_NS: NDArray[np.int64], load_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same for every copy; what is left over goes to the copies on the lowest ranks."""
    rows_NS = np.zeros_like(slots_NS)
    places, expert_C = _by_expert(slots_NS)
    copies_E = np.bincount(expert_C, minlength=len(load_E))
    share_E, rest_E = np.divmod(load_E, np.maximum(copies_E, 1))
    place_C = np.arange(len(expert_C)) - (np.cumsum(copies_E) - copies_E)[expert_C]  # of a copy among its expert's
    rows_NS[places] = share_E[expert_C] + (place_C < rest_E[expert_C])
    return rows_NS


def water_filling(slots_NS: NDArray[np.int64], load_E: NDArray[np.int64]) -> NDArray[np.int64]:
    """The split with the least rows on the busiest rank, to within a row for each copy or a thousandth of all.

    Expert by expert its rows are poured over the ranks that hold it, on top of what the others have put there, until
    nothing changes. This descends to the split with the least sum of squares, which has the lowest peak as well
    (Fujishige, Lexicographically optimal base of a polymatroid, 1980).
    """
    rows_NS = even_split(slots_NS, load_E)
    level_N = rows_NS.sum(1)
    shared = [
        (int(load_E[expert]), places) for expert, places in copies_of(slots_NS, len(load_E)) if len(places[0]) > 1
    ]
    alone_N = level_N.copy()
    for _, (ranks, slots) in shared:
        np.subtract.at(alone_N, ranks, rows_NS[ranks, slots])
    least = max(alone_N.max(initial=0), level_N.mean())  # no split has a lower peak
    for _ in range(SWEEPS):
        if level_N.max(initial=0) <= 1.001 * least:
            break
        changed = 0
        for load, places in shared:
            ranks = places[0]
            below = level_N.copy()
            np.subtract.at(below, ranks, rows_NS[places])
            poured = _pour(load, below[ranks], ranks)
            changed = max(changed, int(np.abs(poured - rows_NS[places]).max()))
            rows_NS[places] = poured
            np.add.at(below, ranks, poured)
            level_N = below
        if changed <= 1:
            break
    return rows_NS


def _pour(load: int, floor_C: NDArray[np.int64], ranks: NDArray[np.int64]) -> NDArray[np.int64]:
    """`load` rows over vessels with these floors, the lowest first, until all that got any stand equally high."""
    if len(set(ranks.tolist())) < len(ranks):  # copies that share a rank share one vessel: the first takes the rows
        first = np.unique(ranks, return_index=True)[1]
        poured = np.zeros_like(floor_C)
        poured[first] = _pour(load, floor_C[first], ranks[first])
        return poured
    order = np.argsort(floor_C, kind="stable")
    floors = floor_C[order]
    filled = np.arange(1, len(floors) + 1) * floors - np.cumsum(floors)  # rows that fill all lower vessels to this one
    wet = int(np.searchsorted(filled, load, side="right"))  # vessels with water; at least one, as the first fills by 0
    level, rest = divmod(load + int(floors[:wet].sum()), wet)
    poured = np.zeros_like(floor_C)
    poured[order[:wet]] = level - floors[:wet] + (np.arange(wet) < rest)
    return poured


def dispatch_rows(
    slots_NS: NDArray[np.int64], counts_PE: NDArray[np.int64], rows_NS: NDArray[np.int64], nodes: Nodes
) -> NDArray[np.int64]:
    """Rows that each source sends to each slot, (P, N, S), so that every slot gets its `rows_NS`.

    A source fills its own copies first, then those of its node, then the others, in the order of ranks.
    """
    sent_PNS = np.where(slots_NS == EMPTY, 0, counts_PE[:, slots_NS])  # right where there is one copy
    for expert, (ranks, slots) in copies_of(slots_NS, counts_PE.shape[1]):
        if len(ranks) > 1:
            flow_PC = _flow(counts_PE[:, expert], rows_NS[ranks, slots], ranks, nodes)
            sent_PNS[:, ranks, slots] = flow_PC
    return sent_PNS


def _flow(give_P: NDArray[np.int64], take_C: NDArray[np.int64], ranks: NDArray[np.int64], nodes: Nodes) -> NDArray:
    """Rows of one expert from each source to each of its copies on these ranks, (P, C)."""
    flow_PC = np.zeros((len(give_P), len(take_C)), dtype=np.int64)
    left_P, room_C = give_P, take_C
    for near_P, near_C in ((np.arange(nodes.ranks), ranks), (nodes.node_N, nodes.node_N[ranks])):
        for place in np.unique(near_C):
            sources, copies = near_P == place, near_C == place
            flow_PC[np.ix_(sources, copies)] += _in_order(left_P[sources], room_C[copies])
        left_P, room_C = give_P - flow_PC.sum(1), take_C - flow_PC.sum(0)
    return flow_PC + _in_order(left_P, room_C)


def _in_order(give_P: NDArray[np.int64], take_C: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first giver fills the first takers and so on: the overlaps of two rows of intervals, (P, C)."""
    give, take = np.cumsum(give_P), np.cumsum(take_C)
    upper = np.minimum(give[:, None], take)
    lower = np.maximum((give - give_P)[:, None], take - take_C)
    return np.maximum(upper - lower, 0)


def copies_of(slots_NS: NDArray[np.int64], experts: int) -> Sequence[tuple[int, tuple[NDArray, NDArray]]]:
    """(expert, (ranks, slots) of its copies in the order of ranks) for every expert."""
    (ranks, slots), expert_C = _by_expert(slots_NS)
    bounds = np.searchsorted(expert_C, np.arange(experts + 1))
    return [
        (expert, (ranks[first:last], slots[first:last]))
        for expert, (first, last) in enumerate(itertools.pairwise(bounds.tolist()))
    ]


def _by_expert(slots_NS: NDArray[np.int64]) -> tuple[tuple[NDArray, NDArray], NDArray[np.int64]]:
    """(ranks, slots) of all copies in the order of experts, then of ranks; and the experts."""
    ranks, slots = np.nonzero(slots_NS != EMPTY)
    order = np.argsort(slots_NS[ranks, slots], kind="stable")
    places = ranks[order], slots[order]
    return places, slots_NS[places]

"""When a rank knows that what it sent has arrived. The order of actions alone decides it."""

from __future__ import annotations

import numpy as np

from pipermoe.schedule.action import RECEIVES, SENDS, Action, Schedule
from pipermoe.schedule.columns import Columns, Ints, inboxes

Arrivals = dict[Action, tuple[Action, ...]]


def acknowledgements(schedule: Schedule, rank: int) -> Arrivals:
    """Which sends of `rank` are known to have arrived after which of its receives."""
    columns = Columns.of(schedule)
    parts = list(schedule.parts(rank))
    first = int(np.searchsorted(columns.rank, rank))
    known = proofs(schedule, columns)[first : first + len(parts)]
    found: dict[int, list[Action]] = {}
    for send, receive in zip(parts, known.tolist(), strict=True):
        if receive >= 0:
            found.setdefault(receive - first, []).append(send)
    return {parts[receive]: tuple(found[receive]) for receive in sorted(found)}


def proofs(schedule: Schedule, columns: Columns) -> Ints:
    """Of every send (P,) of a lowered schedule, the receive of its rank that proves its arrival; -1: none, or no send.

    A receive proves what its sender had received before sending, directly or through others: vector clocks (Fidge 1988,
    Mattern 1989) over the schedule tell where. Waiting for a send there never blocks, so buffers are freed as early as
    a rank can know, by a rule that depends on the schedule and not on timing.
    """
    receives, clocks = _clocks(schedule, columns)
    by = columns.rank[receives]
    ordinal = np.zeros(inboxes(schedule), dtype=np.int64)  # of the receive of an inbox, among those of its rank
    found = np.full(len(columns.rank), -1)
    own = [np.flatnonzero(by == rank) for rank in range(schedule.num_ranks)]
    for each in own:
        ordinal[columns.inbox[receives[each]]] = np.arange(len(each))
    sends = np.flatnonzero(columns.of_kind(*SENDS))
    for rank, peer in sorted({*zip(columns.rank[sends].tolist(), columns.target[sends].tolist(), strict=True)}):
        there = sends[(columns.rank[sends] == rank) & (columns.target[sends] == peer)]
        known = np.searchsorted(clocks[own[rank], peer], ordinal[columns.outbox[there]], side="right")
        found[there] = np.append(receives[own[rank]], -1)[known]
    return found


def _clocks(schedule: Schedule, columns: Columns) -> tuple[Ints, Ints]:
    """Every receive, as its place in the columns, and how many receives of each rank are known to be done after it.

    (receives,) in an order in which they may happen, and (receives, ranks).
    """
    moves = np.flatnonzero(columns.of_kind(*SENDS, *RECEIVES))
    ends = np.searchsorted(columns.rank[moves], np.arange(schedule.num_ranks), side="right").tolist()
    inbox, outbox = columns.inbox[moves].tolist(), columns.outbox[moves].tolist()
    clocks = np.zeros((len(moves) // 2 + 1, schedule.num_ranks), dtype=np.int64)
    rows = list(clocks)
    order: list[int] = []
    at, latest = [0, *ends[:-1]], [-1] * schedule.num_ranks  # the row of the clock of each rank: the last is zero
    carried: dict[int, int] = {}  # with the message for an inbox: the row of its sender's clock
    waiting: dict[int, int] = {}  # for an inbox: a rank
    woken = list(range(schedule.num_ranks))
    while woken:
        rank = woken.pop()
        while at[rank] < ends[rank]:
            move = at[rank]
            if outbox[move] >= 0:
                carried[outbox[move]] = latest[rank]
                if outbox[move] in waiting:
                    woken.append(waiting.pop(outbox[move]))
            elif inbox[move] in carried:
                row = len(order)
                np.maximum(rows[latest[rank]], rows[carried[inbox[move]]], out=rows[row])
                rows[row][rank] += 1
                latest[rank] = row
                order.append(move)
            else:
                waiting[inbox[move]] = rank
                break
            at[rank] += 1
    return moves[order], clocks[:-1]

"""When a rank knows that what it sent has arrived. The order of actions alone decides it."""

from __future__ import annotations

from collections import defaultdict

from pipermoe.schedule.action import RECEIVES, SENDS, Action, Schedule
from pipermoe.schedule.communication import matching_receive

Arrivals = dict[Action, tuple[Action, ...]]


def acknowledgements(schedule: Schedule, rank: int) -> Arrivals:
    """Which sends of `rank` are known to have arrived after which of its receives."""
    return all_acknowledgements(schedule)[rank]


def all_acknowledgements(schedule: Schedule) -> list[Arrivals]:
    """`acknowledgements` of every rank of a lowered schedule.

    A receive proves what its sender had received before sending, directly or through others: vector clocks (Fidge 1988,
    Mattern 1989) over the schedule tell where. Waiting for a send there never blocks, so buffers are freed as early as
    a rank can know, by a rule that depends on the schedule and not on timing.
    """
    ranks = range(schedule.num_ranks)
    programs = [list(schedule.parts(rank)) for rank in ranks]
    index = {(rank, action): i for rank in ranks for i, action in enumerate(programs[rank])}
    clocks = [[0] * schedule.num_ranks for _ in ranks]  # clocks[a][b]: actions of b that a knows to be done
    position = [0] * schedule.num_ranks
    carried: dict[Action, list[int]] = {}  # by the receive that takes it
    pending: list[dict[Action, tuple[int, int]]] = [{} for _ in ranks]  # sends: (peer, index of the receive)
    settled: list[dict[Action, list[Action]]] = [defaultdict(list) for _ in ranks]
    progress = True
    while progress:
        progress = False
        for rank, program in enumerate(programs):
            while position[rank] < len(program):
                action = program[position[rank]]
                if action.kind in RECEIVES:
                    if action not in carried:
                        break
                    clocks[rank] = list(map(max, clocks[rank], carried.pop(action)))
                position[rank] += 1
                clocks[rank][rank] = position[rank]
                progress = True
                if action.kind in SENDS:
                    receive = matching_receive(action)
                    carried[receive] = list(clocks[rank])
                    peer = schedule.rank_of(receive.stage, receive.microbatch)
                    pending[rank][action] = (peer, index[peer, receive])
                elif action.kind in RECEIVES:
                    arrived = [send for send, (peer, i) in pending[rank].items() if clocks[rank][peer] > i]
                    for send in arrived:
                        del pending[rank][send]
                        settled[rank][action].append(send)
    return [{receive: tuple(sends) for receive, sends in each.items()} for each in settled]

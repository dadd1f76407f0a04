"""The timelines of one schedule under many durations at once.

The order of a schedule's actions is fixed, so its timeline is a fixed sequence of sums and maxima (a max-plus
program): one walk over the actions advances every candidate. `schedule.timeline.simulate` is the same for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipermoe.schedule.action import Schedule
from pipermoe.schedule.durations import Durations, WorkTable
from pipermoe.schedule.program import Program, compile_program

# C candidates, R pipeline ranks


def end_seconds(schedule: Schedule, candidates: Sequence[Durations]) -> NDArray[np.float64]:
    """When each rank ends its last action, (C, R), equal to `simulate` of each candidate to the bit.

    The candidates share one `overlap_efficiency`. Raises ValueError when the schedule cannot run to its end.
    """
    work = WorkTable.stacked([durations.per_stage(schedule.num_stages) for durations in candidates])
    walk = _Walk(compile_program(schedule, work), len(candidates))
    woken = list(range(schedule.num_ranks))
    while woken:
        walk.advance(woken.pop(), woken)
    walk.program.check_finished(walk.done)
    return np.stack(walk.last, axis=1)


class _Walk:
    """Every rank runs until it lacks an input; what it waits for wakes it. Times are arrays (C,)."""

    def __init__(self, program: Program, candidates: int) -> None:
        ranks = range(len(program.steps))
        zero = np.zeros(candidates)
        self.program = program
        self.arrival: list[Any] = [None] * program.slots
        self.waiting: dict[int, int] = {}
        self.link_free: dict[tuple[int, int], Any] = {}
        self.now = [zero for _ in ranks]
        self.lane_free = [zero for _ in ranks]
        self.last = [zero for _ in ranks]
        self.done = [0 for _ in ranks]

    def advance(self, rank: int, woken: list[int]) -> None:
        steps, arrival, now = self.program.steps[rank], self.arrival, self.now[rank]
        works, links = self.program.works, self.program.links
        for position in range(self.done[rank], len(steps)):
            needs, work, gives = steps[position]
            missing = [slot for slot in needs if arrival[slot] is None]
            if missing:
                self.waiting[missing[0]] = rank
                break
            for slot in needs:
                now = np.maximum(now, arrival[slot])
            compute, exchange, lane = works[work]
            if lane is None:
                end = now = now + compute + exchange
            else:
                end = self.lane_free[rank] = np.maximum(now, self.lane_free[rank]) + lane
            self.last[rank] = np.maximum(self.last[rank], end)
            for slot, receiver, link in gives:
                arrival[slot] = self._carry(rank, receiver, end, links[link])
                if slot in self.waiting:
                    woken.append(self.waiting.pop(slot))
            self.done[rank] = position + 1
        self.now[rank] = now

    def _carry(self, sender: int, receiver: int, end: Any, seconds: Any) -> Any:
        """When a message that is ready at `end` arrives: messages of a link follow each other."""
        if sender == receiver:
            return end
        link = (sender, receiver)
        if link in self.link_free:
            end = np.maximum(end, self.link_free[link])
        self.link_free[link] = end = end + seconds
        return end

"""The timeline of a schedule whose ranks are processes on one host with fewer cores than processes."""

from __future__ import annotations

import heapq
from itertools import count

from pipermoe.schedule.action import Schedule
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.program import Work, compile_program
from pipermoe.schedule.timeline import Mail, Timeline, timeline_of


def simulate_shared_host(
    schedule: Schedule, durations: Durations, compute_slots: float, ranks_per_stage: int = 1
) -> Timeline:
    """Like `simulate`, but the computing processes share `compute_slots` cores equally.

    Every pipeline rank stands for `ranks_per_stage` processes in lockstep. While n processes compute, each advances at
    rate min(1, compute_slots / n) (processor sharing); all-to-alls, transfers and collectives, which follow an action's
    computation, are not stretched. With enough cores for all processes it equals `simulate` exactly. A pipeline bubble
    costs nothing here as long as the other processes keep the cores busy.
    """
    if compute_slots < 1 or ranks_per_stage < 1:
        raise ValueError("compute_slots and ranks_per_stage must be at least 1")
    return _SharedHost(schedule, durations, compute_slots, ranks_per_stage).run()


class _SharedClock:
    """Work done per computing process since the start ("virtual time"), as a function of time.

    All computing processes advance equally, so a computation that starts at virtual time v ends at v + its seconds,
    whatever others come and go. At full rate virtual time is time, shifted: no rounding distinguishes them.
    """

    def __init__(self, compute_slots: float, ranks_per_stage: int) -> None:
        self.slots, self.width = compute_slots, ranks_per_stage
        self.computing = 0
        self.rate, self.shift = 1.0, 0.0  # time = virtual / rate + shift

    def virtual(self, time: float) -> float:
        return (time - self.shift) * self.rate

    def time(self, virtual: float) -> float:
        return virtual / self.rate + self.shift

    def change(self, time: float, difference: int) -> None:
        """From `time` on, `difference` more pipeline ranks compute."""
        virtual = self.virtual(time)
        self.computing += difference
        rate = min(1.0, self.slots / max(self.computing * self.width, 1))
        if rate != self.rate:
            self.rate, self.shift = rate, time - virtual / rate


class _SharedHost:
    """Events in the order of time: a rank may start, its computation ends, its all-to-all ends."""

    def __init__(self, schedule: Schedule, durations: Durations, compute_slots: float, ranks_per_stage: int) -> None:
        self.program = compile_program(schedule, durations.per_stage(schedule.num_stages))
        ranks = range(schedule.num_ranks)
        self.mail = Mail(self.program)
        self.clock = _SharedClock(compute_slots, ranks_per_stage)
        self.start: list[list[float]] = [[] for _ in ranks]
        self.end: list[list[float]] = [[] for _ in ranks]
        self.free_at = [0.0 for _ in ranks]
        self.lane_free = [0.0 for _ in ranks]
        self.tie = count()
        self.computing: list[tuple[float, int, int]] = []  # (virtual end, tie, rank)
        self.later: list[tuple[float, int, int, bool]] = []  # (time, tie, rank, whether it then starts to compute)

    def run(self) -> Timeline:
        for rank in range(len(self.start)):
            self._next(rank)
        while self.computing or self.later:
            ends = self.clock.time(self.computing[0][0]) if self.computing else float("inf")
            if self.later and self.later[0][0] < ends:
                time, _, rank, starts = heapq.heappop(self.later)
                if starts:
                    self._compute(rank, time)
                else:
                    self._finish(rank, time)
            else:
                _, _, rank = heapq.heappop(self.computing)
                self.clock.change(ends, -1)
                exchange = self._work(rank).exchange
                if exchange:
                    heapq.heappush(self.later, (ends + exchange, next(self.tie), rank, False))
                else:
                    self._finish(rank, ends)
        return timeline_of(self.program, self.start, self.end, self.mail.transfer_seconds)

    def _next(self, rank: int) -> None:
        """Let `rank` go on to its next computation, if its data is there or on its way."""
        while (position := len(self.end[rank])) < len(self.program.steps[rank]):
            step, work = self.program.steps[rank][position], self._work(rank)
            start = self.mail.ready(step.needs, rank, self.free_at[rank])
            if start is None:
                return
            if work.lane is None and (work.compute or work.exchange):
                heapq.heappush(self.later, (start, next(self.tie), rank, True))
                return
            if work.lane is not None:
                start = max(start, self.lane_free[rank])
                end = self.lane_free[rank] = start + work.lane
            else:
                end = self.free_at[rank] = start
            self._record(rank, start, end)

    def _compute(self, rank: int, time: float) -> None:
        self.start[rank].append(time)
        self.clock.change(time, 1)
        heapq.heappush(self.computing, (self.clock.virtual(time) + self._work(rank).compute, next(self.tie), rank))

    def _work(self, rank: int) -> Work:
        """The next one of `rank`."""
        return self.program.works[self.program.steps[rank][len(self.end[rank])].work]

    def _finish(self, rank: int, time: float) -> None:
        self.free_at[rank] = time
        self._record(rank, self.start[rank].pop(), time)
        self._next(rank)

    def _record(self, rank: int, start: float, end: float) -> None:
        """The next action of `rank` is done; ranks that waited for its result go on."""
        step = self.program.steps[rank][len(self.end[rank])]
        self.start[rank].append(start)
        self.end[rank].append(end)
        for give in step.gives:
            waiter = self.mail.deliver(rank, give, end)
            if waiter is not None:
                self._next(waiter)

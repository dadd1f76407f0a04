"""When every action of a schedule starts and ends: an event simulation with given durations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from pipermoe.schedule.action import Kind, Schedule
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.program import Give, Program, compile_program


@dataclass(frozen=True, slots=True)
class Timeline:
    """Start and end in seconds of every action, aligned with `schedule.ranks`.

    `compute_seconds[r]` is computation, `exchange_seconds[r]` all-to-alls that nothing hides, `transfer_seconds[r]` the
    part of the idle time spent waiting for messages that were already on their way.
    """

    schedule: Schedule
    start: tuple[tuple[float, ...], ...]
    end: tuple[tuple[float, ...], ...]
    compute_seconds: tuple[float, ...]
    exchange_seconds: tuple[float, ...]
    transfer_seconds: tuple[float, ...]

    @property
    def step_seconds(self) -> float:
        return max((max(ends, default=0.0) for ends in self.end), default=0.0)

    def idle_seconds(self, rank: int) -> float:
        """The part of the step in which the rank neither computes nor runs an exposed all-to-all: the bubble."""
        return self.step_seconds - self.compute_seconds[rank] - self.exchange_seconds[rank]

    @property
    def bubble_fraction(self) -> tuple[float, ...]:
        """Per rank, the idle share of the step."""
        return tuple(self.idle_seconds(rank) / self.step_seconds for rank in range(self.schedule.num_ranks))

    def memory(
        self, rank: int, stage_bytes: Sequence[float], weight_grad_bytes: Sequence[float] | None = None
    ) -> list[tuple[float, float]]:
        """(time, bytes of activations alive from then on) at every change; arguments as in peak_activation_bytes."""
        kept = stage_bytes if weight_grad_bytes is None else weight_grad_bytes
        changes = []
        for action, start, end in zip(self.schedule.ranks[rank], self.start[rank], self.end[rank], strict=True):
            for part in action.parts:
                if part.kind is Kind.FORWARD:
                    changes.append((start, stage_bytes[part.stage]))
                elif part.kind is Kind.BACKWARD:
                    changes.append((end, -stage_bytes[part.stage]))
                elif part.kind is Kind.INPUT_GRAD:
                    changes.append((end, kept[part.stage] - stage_bytes[part.stage]))
                elif part.kind is Kind.WEIGHT_GRAD:
                    changes.append((end, -kept[part.stage]))
        profile, held = [], 0.0
        for time, change in sorted(changes):  # what is freed at an instant is free for what starts then
            held += change
            profile.append((time, held))
        return profile


def simulate(schedule: Schedule, durations: Durations | None = None) -> Timeline:
    """Run the schedule: every rank does its actions in order, each as soon as its data is there.

    Sends never hold the sender up; messages between two ranks in one direction follow each other on their link. In a
    schedule with sends and receives every receive blocks its rank until the message is there.
    Raises ValueError when the schedule cannot run to its end.
    """
    program = compile_program(schedule, (durations or Durations()).per_stage(schedule.num_stages))
    run = _Run(program)
    woken = list(range(schedule.num_ranks))
    while woken:
        run.advance(woken.pop(), woken)
    return timeline_of(program, run.start, run.end, run.mail.transfer_seconds)


def timeline_of(
    program: Program, start: list[list[float]], end: list[list[float]], transfer_seconds: list[float]
) -> Timeline:
    """The Timeline of a finished run; ValueError if a rank is stuck."""
    program.check_finished([len(ends) for ends in end])
    return Timeline(
        program.schedule,
        tuple(map(tuple, start)),
        tuple(map(tuple, end)),
        tuple(sum(program.works[step.work].compute for step in steps) for steps in program.steps),
        tuple(sum(program.works[step.work].exchange for step in steps) for steps in program.steps),
        tuple(transfer_seconds),
    )


class Mail:
    """When every piece of data reaches its consumer."""

    def __init__(self, program: Program) -> None:
        self.links: list[float] = program.links
        self.arrival: list[float | None] = [None] * program.slots
        self.sent: dict[int, float] = {}  # slot -> when a message that took time was ready to leave
        self.link_free: dict[tuple[int, int], float] = {}
        self.waiting: dict[int, int] = {}  # slot -> the rank that waits for it
        self.transfer_seconds = [0.0] * len(program.steps)

    def ready(self, needs: tuple[int, ...], rank: int, now: float) -> float | None:
        """When all of `needs` are there, at least `now`; None if one is not on its way yet: `rank` waits for it."""
        start = now
        for slot in needs:
            arrival = self.arrival[slot]
            if arrival is None:
                self.waiting[slot] = rank
                return None
            if arrival > start:
                start = arrival
        if start > now and self.sent:
            latest = [self.sent.get(slot, start) for slot in needs if self.arrival[slot] == start]
            self.transfer_seconds[rank] += start - max(now, *latest)
        return start

    def deliver(self, sender: int, give: Give, end: float) -> int | None:
        """Data is produced at `end`; the rank that waited for it, if any."""
        slot, receiver, link = give
        if receiver != sender:
            way = (sender, receiver)
            left, end = end, max(end, self.link_free.get(way, 0.0)) + self.links[link]
            self.link_free[way] = end
            if end > left:
                self.sent[slot] = left
        self.arrival[slot] = end
        return self.waiting.pop(slot, None)


class _Run:
    """One run, rank by rank: as every wait is for one known message, the order of visits does not matter."""

    def __init__(self, program: Program) -> None:
        ranks = range(len(program.steps))
        self.program = program
        self.mail = Mail(program)
        self.start: list[list[float]] = [[] for _ in ranks]
        self.end: list[list[float]] = [[] for _ in ranks]
        self.now = [0.0 for _ in ranks]
        self.lane_free = [0.0 for _ in ranks]

    def advance(self, rank: int, woken: list[int]) -> None:
        """Run `rank` until an action lacks its data; ranks whose data comes meanwhile are added to `woken`."""
        starts, ends, mail, now = self.start[rank], self.end[rank], self.mail, self.now[rank]
        works = self.program.works
        for needs, work, gives in islice(self.program.steps[rank], len(ends), None):
            start = mail.ready(needs, rank, now) if needs else now
            if start is None:
                break
            compute, exchange, lane = works[work]
            if lane is None:
                end = now = start + compute + exchange
            else:
                start = max(now, self.lane_free[rank])
                end = self.lane_free[rank] = start + lane
            starts.append(start)
            ends.append(end)
            for give in gives:
                waiter = mail.deliver(rank, give, end)
                if waiter is not None:
                    woken.append(waiter)
        self.now[rank] = now

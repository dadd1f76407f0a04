"""List scheduling: close the gaps in a given order of F and I as far as memory allows and fill the rest with W."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipermoe.schedule.action import Action, Kind, Schedule
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.program import Step, Work, compile_program
from pipermoe.schedule.timeline import Mail

# What overlapped variants are laid out for: F = I = W = 1 and all-to-alls of half of F and of I.
LONG_EXCHANGES = Durations(forward_exchange=0.5, backward_exchange=0.5)


@dataclass(frozen=True, slots=True)
class Limits:
    """Activation memory: what one micro-batch takes on each stage, and what each rank may hold, in the same unit."""

    stage: tuple[float, ...]
    rank: tuple[float, ...]

    @classmethod
    def equal(cls, schedule: Schedule, activations: float) -> Limits:
        """One unit per stage and micro-batch; every rank may hold `activations` of them."""
        return cls((1.0,) * schedule.num_stages, (float(activations),) * schedule.num_ranks)


def spine_peaks(spines: Schedule, stage: Sequence[float]) -> list[float]:
    """Per rank, the memory that strict spine order needs when every weight gradient follows its I at once."""
    return [_peak(spine, stage) for spine in spines.ranks]


def _peak(spine: Sequence[Action], stage: Sequence[float]) -> float:
    held = peak = 0.0
    for action in spine:
        for part in action.parts:
            held += _change(part, stage)
            peak = max(peak, held)
    return peak


def _change(part: Action, stage: Sequence[float]) -> float:
    """What a part of a spine adds to memory, the weight gradient of an I included."""
    return stage[part.stage] if part.kind is Kind.FORWARD else -stage[part.stage]


def squeeze(spines: Schedule, limits: Limits, durations: Durations | None = None, patience: float = 1.0) -> Schedule:
    """Weight gradients added to orders of F and I ("spines"), every action as early as data and memory allow.

    A spine may also hold full backwards and overlapped pairs; only its I get a W.

    Each rank takes its next spine action if its data is there; otherwise a later one whose data is there, if memory
    still suffices for all that it overtakes; otherwise the oldest pending weight gradient. Such a filler may delay the
    next spine action if its data is known to arrive before: `patience` is the part of the filler's time that must fit
    before that (1: never delay it, 0: never wait for it). A rank whose memory is full does weight gradients first.
    Strict spine order must be within `limits`; then so is the result.
    """
    run = _ListScheduler(spines, limits, durations or Durations(), patience)
    return replace(spines, ranks=tuple(map(tuple, run.run())))


class _Queue:
    """One rank: its spine, what is left of it, its pending weight gradients and the memory it holds.

    Spine actions go by their place in the spine. `ready[i]` is when the data of action i is there, None as long as that
    is not known.
    """

    def __init__(
        self,
        spine: Sequence[Action],
        steps: Sequence[Step],
        works: Sequence[Work],
        stage: Sequence[float],
        last_stage: int,
    ) -> None:
        self.spine, self.steps, self.works = spine, steps, [works[step.work] for step in steps]
        self.changes = [[_change(part, stage) for part in action.parts] for action in spine]
        self.extra = [_peak([action], stage) for action in spine]
        self.seconds = [work.compute + work.exchange for work in self.works]
        self.todo = list(range(len(spine)))
        # The last stage's backward gets nothing from elsewhere: it needs its own forward.
        self.turns = {
            part.microbatch: i
            for i, action in enumerate(spine)
            for part in action.parts
            if part.stage == last_stage and part.kind is not Kind.FORWARD
        }
        self.missing = [len(step.needs) for step in steps]
        for i in self.turns.values():
            self.missing[i] += 1
        self.ready: list[float | None] = [None if n else 0.0 for n in self.missing]
        self.latest = [0.0] * len(spine)
        self.known = [i for i in self.todo if self.ready[i] is not None]  # of what is left, in order
        self.pending: deque[Action] = deque()
        self.order: list[Action] = []
        self.pending_size = 0.0  # memory that the pending weight gradients would free
        self.held = 0.0
        self.free_at = 0.0

    def receive(self, i: int, arrival: float) -> None:
        """An input of action `i` is there at `arrival`."""
        self.missing[i] -= 1
        self.latest[i] = max(self.latest[i], arrival)
        if not self.missing[i]:
            self.ready[i] = self.latest[i]
            insort(self.known, i)

    def take(self, i: int) -> None:
        """Action `i` runs."""
        del self.todo[bisect_left(self.todo, i)]
        del self.known[bisect_left(self.known, i)]


class _ListScheduler:
    def __init__(self, spines: Schedule, limits: Limits, durations: Durations, patience: float) -> None:
        program = compile_program(spines, durations.per_stage(spines.num_stages))
        self.limits, self.patience = limits, patience
        self.mail = Mail(program)
        self.weight_grad = durations.per_stage(spines.num_stages).compute[Kind.WEIGHT_GRAD]
        self.last_stage = spines.num_stages - 1
        pairs = zip(spines.ranks, program.steps, strict=True)
        self.queues = [_Queue(*pair, program.works, limits.stage, self.last_stage) for pair in pairs]
        self.reader = {slot: i for steps in program.steps for i, step in enumerate(steps) for slot in step.needs}
        self.window = 4 * spines.num_stages  # how far ahead a rank looks for something ready
        self.events = [(0.0, rank) for rank in range(len(self.queues))]

    def run(self) -> list[list[Action]]:
        while self.events:
            now, rank = heapq.heappop(self.events)
            queue = self.queues[rank]
            if now >= queue.free_at and (queue.todo or queue.pending):
                self._choose(queue, rank, now)
        return [queue.order for queue in self.queues]

    def _choose(self, queue: _Queue, rank: int, now: float) -> None:
        if not queue.todo:
            self._run_weight_grad(queue, rank, now)
            return
        following = queue.todo[0]
        ready = queue.ready[following]
        if queue.pending and not self._fits(queue, rank, queue.extra[following]):
            self._run_weight_grad(queue, rank, now)
        elif ready is not None and ready <= now:
            self._run_spine(queue, rank, following, now)
        else:
            wait = math.inf if ready is None else ready - now
            early = self._ready_later(queue, rank, now, wait)
            if early is not None:
                self._run_spine(queue, rank, early, now)
            elif queue.pending and wait >= self.patience * self.weight_grad[queue.pending[0].stage]:
                self._run_weight_grad(queue, rank, now)
            elif ready is not None:
                heapq.heappush(self.events, (ready, rank))  # otherwise the delivery wakes the rank

    def _fits(self, queue: _Queue, rank: int, extra: float) -> bool:
        return queue.held + extra <= self.limits.rank[rank] * (1 + 1e-9)

    def _ready_later(self, queue: _Queue, rank: int, now: float, wait: float) -> int | None:
        """A spine action that may overtake those before it: data there, memory enough, not too long."""
        todo, at = queue.todo, 0
        rise = highest = 0.0  # memory of todo[:at] relative to now, after all pending weight gradients
        beyond = todo[self.window] if self.window < len(todo) else len(queue.spine)
        for i in queue.known:
            if i >= beyond:
                break
            if i == todo[0] or queue.latest[i] > now or wait < self.patience * queue.seconds[i]:
                continue
            if not queue.extra[i]:
                return i
            if not self._fits(queue, rank, queue.extra[i]):
                continue
            while todo[at] != i:
                for change in queue.changes[todo[at]]:
                    rise += change
                    highest = max(highest, rise)
                at += 1
            if self._fits(queue, rank, max(sum(queue.changes[i]), 0.0) + highest - queue.pending_size):
                return i
        return None

    def _run_spine(self, queue: _Queue, rank: int, i: int, now: float) -> None:
        queue.take(i)
        action, work = queue.spine[i], queue.works[i]
        for part in action.parts:
            if part.kind is Kind.INPUT_GRAD:
                queue.pending.append(Action(Kind.WEIGHT_GRAD, part.stage, part.microbatch))
                queue.pending_size += self.limits.stage[part.stage]
            else:
                queue.held += _change(part, self.limits.stage)
            if part.kind is Kind.FORWARD and part.stage == self.last_stage:
                queue.receive(queue.turns[part.microbatch], 0.0)
        self._append(queue, rank, action, now + work.compute + work.exchange)
        for give in queue.steps[i].gives:
            slot, peer, _ = give
            self.mail.deliver(rank, give, queue.free_at)
            arrival = self.mail.arrival[slot] or 0.0
            self.queues[peer].receive(self.reader[slot], arrival)
            heapq.heappush(self.events, (arrival, peer))

    def _run_weight_grad(self, queue: _Queue, rank: int, now: float) -> None:
        action = queue.pending.popleft()
        queue.held -= self.limits.stage[action.stage]
        queue.pending_size -= self.limits.stage[action.stage]
        self._append(queue, rank, action, now + self.weight_grad[action.stage])

    def _append(self, queue: _Queue, rank: int, action: Action, end: float) -> None:
        queue.order.append(action)
        queue.free_at = end
        heapq.heappush(self.events, (end, rank))

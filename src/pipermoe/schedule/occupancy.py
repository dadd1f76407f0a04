"""What a pipeline rank holds while each of its actions runs: counts of micro-batches and of messages.

The order of a schedule alone decides it. Sizes in bytes are the business of `resources`; here a count says how many
times each of them is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipermoe.schedule.action import COMPUTE, RECEIVES, Action, Kind, Schedule
from pipermoe.schedule.arrivals import Arrivals, all_acknowledgements
from pipermoe.schedule.builders import build
from pipermoe.schedule.communication import receive_of, send_of, with_communication

REPEATS = 2  # micro-batches per pipeline rank after which a schedule repeats itself


class Held(NamedTuple):
    """Message-sized buffers of a rank, beside its activations."""

    outputs: int  # forward results sent and not known to have arrived, or waiting for the next stage on this rank
    gradients: int  # the same of input gradients
    incoming: int  # inputs and gradients received and not used yet, or made by another stage of this rank
    received: int  # inputs that came from another rank and belong to activations since


class Occupancy(NamedTuple):
    """What `rank` holds while it works on `stage` (`kind` F, B or I): per chunk, in the order of `stages_of(rank)`.

    `kept[c]` micro-batches have the activations of a forward on chunk c, the current one included; `deferred[c]` only
    what their weight gradients still need. The result of the action is in `messages` already, its operands still are.
    A backward of a pair runs `beside` the forward of that stage, layer by layer in turn; alone, that is -1.
    """

    rank: int
    kind: Kind
    stage: int
    beside: int
    kept: tuple[int, ...]
    deferred: tuple[int, ...]
    messages: Held

    @property
    def counts(self) -> tuple[int, ...]:
        return (*self.kept, *self.deferred, *self.messages)

    @property
    def measure(self) -> tuple[int, ...]:
        """Where none of these is larger than another's of the same work, so are no bytes.

        All messages are alike, and activations are at least as large as one: they contain their input.
        """
        outputs, gradients, incoming, _ = self.messages
        return (*self.kept, *self.deferred, sum(self.kept) + outputs + gradients + incoming)


def occupancies(schedule: Schedule) -> list[Occupancy]:
    """The occupancies of all ranks that can be the most: none is below another in every count at the same work."""
    lowered = with_communication(schedule)
    arrivals = all_acknowledgements(lowered)
    found: list[Occupancy] = []
    for rank in range(lowered.num_ranks):
        found += _largest(_Walk(lowered, rank).run(arrivals[rank]))
    return found


def _posted(actions: Sequence[Action], i: int) -> int:
    """The receives between compute action `i` (-1: the start) and the next one: their buffers wait beside it."""
    count = 0
    for action in actions[i + 1 :]:
        if action.kind in COMPUTE:
            break
        count += action.kind in RECEIVES
    return count


class _Walk:
    """One rank's actions in order, counting."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.schedule, self.rank = schedule, rank
        self.chunk = {stage: c for c, stage in enumerate(schedule.stages_of(rank))}
        self.kept = [0] * len(self.chunk)
        self.deferred = [0] * len(self.chunk)
        self.outputs = self.gradients = self.incoming = self.received = 0

    def run(self, arrived: Arrivals) -> set[Occupancy]:
        seen = set()
        actions = self.schedule.ranks[self.rank]
        self.incoming = _posted(actions, -1)
        for i, action in enumerate(actions):
            if action.kind in COMPUTE:
                self.incoming += _posted(actions, i)
                seen.update(self._compute(action))
            for sent in arrived.get(action, ()):
                if sent.kind is Kind.SEND_FORWARD:
                    self.outputs -= 1
                else:
                    self.gradients -= 1
        return seen

    def _compute(self, action: Action) -> Iterator[Occupancy]:
        """The occupancy of one action. The parts of a pair run in turn, so both begin before either ends."""
        parts = [part for part in action.parts if part.kind is not Kind.WEIGHT_GRAD]
        for part in parts:
            self._begin(part)
        if action.pair:
            yield self._now(action.pair[1], beside=action.pair[0].stage)
        elif parts:
            yield self._now(action)
        for part in parts:
            self._end(part)
        if action.kind is Kind.WEIGHT_GRAD:
            self.deferred[self.chunk[action.stage]] -= 1

    def _now(self, action: Action, beside: int = -1) -> Occupancy:
        messages = Held(self.outputs, self.gradients, self.incoming, self.received)
        kept, deferred = tuple(self.kept), tuple(self.deferred)
        return Occupancy(self.rank, action.kind, action.stage, beside, kept, deferred, messages)

    def _begin(self, action: Action) -> None:
        if action.kind is not Kind.FORWARD:
            return
        self.kept[self.chunk[action.stage]] += 1
        if action.stage > 0:  # the input is one of the activations from now on
            self.incoming -= 1
        self.received += receive_of(self.schedule, action, self.rank) is not None
        if action.stage < self.schedule.num_stages - 1:
            self.outputs += 1

    def _end(self, action: Action) -> None:
        last = self.schedule.num_stages - 1
        if action.kind is Kind.FORWARD:
            if action.stage < last and send_of(self.schedule, action, self.rank) is None:
                self.outputs -= 1
                self.incoming += 1
            return
        self.kept[self.chunk[action.stage]] -= 1
        forward = Action(Kind.FORWARD, action.stage, action.microbatch)
        self.received -= receive_of(self.schedule, forward, self.rank) is not None
        if action.kind is Kind.INPUT_GRAD:
            self.deferred[self.chunk[action.stage]] += 1
        self.incoming -= action.stage < last
        if action.stage > 0:
            if send_of(self.schedule, action, self.rank) is None:
                self.incoming += 1
            else:
                self.gradients += 1


def _largest(seen: set[Occupancy]) -> list[Occupancy]:
    """Those that no other of the same work exceeds or equals in every count, in a fixed order."""
    best: list[Occupancy] = []
    for each in sorted(seen, key=lambda o: (-sum(o.measure), o[1:4], o.counts)):
        same = (o for o in best if o[1:4] == each[1:4])
        if not any(all(a >= b for a, b in zip(o.measure, each.measure, strict=True)) for o in same):
            best.append(each)
    return sorted(best, key=lambda o: (o[1:4], o.counts))


class Growth(NamedTuple):
    """Occupancies of a schedule for M = `least` + i * `period` micro-batches: `counts` + i * `slope`.

    After two micro-batches per pipeline rank a schedule repeats itself with every further one per rank: its counts
    stay, or (GPipe, breadth-first: all forwards first) grow. `work` is (rank, kind, stage, beside) of every row.
    """

    least: int
    period: int
    stages_of: tuple[tuple[int, ...], ...]  # of every rank
    work: tuple[tuple[int, Kind, int, int], ...]
    counts: NDArray[np.int64]  # (rows, 2 * chunks + 4): kept, deferred, messages
    slope: NDArray[np.int64]

    def at(self, microbatches: int) -> NDArray[np.int64]:
        return self.counts + (microbatches - self.least) // self.period * self.slope


def growth(name: str, pipeline_parallel: int, virtual_stages: int, microbatches: int) -> Growth:
    """The occupancies of a named schedule for `microbatches`, and for every number a period further."""
    least = (REPEATS + 1) * pipeline_parallel + microbatches % pipeline_parallel
    if microbatches > least:
        repeating = _repeating(name, pipeline_parallel, virtual_stages, least)
        if repeating is not None:
            return repeating
    return _growth(name, pipeline_parallel, virtual_stages, microbatches)


@lru_cache(maxsize=4096)
def _growth(name: str, pipeline_parallel: int, virtual_stages: int, microbatches: int) -> Growth:
    first = build(name, pipeline_parallel, microbatches, virtual_stages)
    work, counts = _table(first)
    stages_of = tuple(first.stages_of(rank) for rank in range(first.num_ranks))
    return Growth(microbatches, pipeline_parallel, stages_of, work, counts, np.zeros_like(counts))


@lru_cache(maxsize=4096)
def _repeating(name: str, pipeline_parallel: int, virtual_stages: int, least: int) -> Growth | None:
    """The growth from `least` on; None where the next periods do not follow it."""
    tables = (_growth(name, pipeline_parallel, virtual_stages, least + i * pipeline_parallel) for i in range(3))
    first, second = next(tables), next(tables)
    if first.work != second.work:
        return None
    slope = second.counts - first.counts
    if slope.any():
        third = next(tables)
        if third.work != first.work or (third.counts - second.counts != slope).any():
            return None
    return first._replace(slope=slope)


def _table(schedule: Schedule) -> tuple[tuple[tuple[int, Kind, int, int], ...], NDArray[np.int64]]:
    found = occupancies(schedule)
    return tuple(o[:4] for o in found), np.array([o.counts for o in found], dtype=np.int64)

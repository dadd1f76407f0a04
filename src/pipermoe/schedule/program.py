"""A schedule with durations, compiled for simulation: what every action waits for, does and delivers."""

from __future__ import annotations

from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from pipermoe.schedule.action import COMPUTE, SENDS, Action, Kind, Schedule, overlap
from pipermoe.schedule.columns import KINDS, Columns, Ints, inboxes
from pipermoe.schedule.durations import WorkTable

Give = tuple[int, int, int]  # data delivered: to a mailbox slot, of a rank, by a link of `Program.links`


class Step(NamedTuple):
    """An action as the simulations see it. A mailbox slot is an inbox (columns.py) or holds a stage's gathered weights;
    `work` is a place in `Program.works`.
    """

    needs: tuple[int, ...]
    work: int
    gives: tuple[Give, ...]


class Work(NamedTuple):
    """Seconds of an action: numbers, or arrays with one number per candidate (schedule/batch.py)."""

    compute: Any
    exchange: Any
    lane: Any = None  # on the collective lane, beside computation


class Program(NamedTuple):
    """Steps aligned with `schedule.ranks`, and the seconds of all works and links that they name."""

    schedule: Schedule
    steps: list[list[Step]]
    slots: int
    works: list[Work]
    links: list[Any]

    def check_finished(self, done: list[int]) -> None:
        """Raise ValueError, naming what waits, unless every rank did all its steps."""
        pairs = zip(self.schedule.ranks, done, strict=True)
        stuck = [f"rank {rank} at {acts[n]}" for rank, (acts, n) in enumerate(pairs) if n < len(acts)]
        if stuck:
            raise ValueError(f"schedule {self.schedule.name} cannot run to its end: {', '.join(stuck)}")


def compile_program(schedule: Schedule, work: WorkTable) -> Program:
    """Resolve every action's inputs, work and outputs once, so that simulating is a short loop."""
    steps, examples = _steps(schedule)
    slots = inboxes(schedule) + schedule.num_ranks * schedule.num_stages
    links = [0.0, *work.transfer, *work.transfer_backward]
    return Program(schedule, steps, slots, [_work(work, action) for action in examples], links)


def _work(table: WorkTable, action: Action) -> Work:
    if action.kind in table.lane:
        return Work(0.0, 0.0, table.lane[action.kind][action.stage])
    return Work(*table.work(action)) if action.kind in COMPUTE else Work(0.0, 0.0)


@lru_cache(maxsize=16)  # a schedule is simulated with many durations
def _steps(schedule: Schedule) -> tuple[list[list[Step]], list[Action]]:
    """The steps of every rank, and an action of every work that they name."""
    columns, stages = Columns.of(schedule), schedule.num_stages
    codes, which = np.unique(columns.kind * stages + columns.stage, return_inverse=True)
    examples = [Action(KINDS[code // stages], code % stages, 0) for code in codes.tolist()]
    parts = map(Step, _needs(schedule, columns), which.tolist(), _gives(schedule, columns))
    if len(columns.rank) == sum(map(len, schedule.ranks)):
        return [list(islice(parts, len(actions))) for actions in schedule.ranks], examples
    pairs: dict[tuple[int, int], int] = {}

    def step(action: Action) -> Step:
        if not action.pair:
            return next(parts)
        forward, backward = next(parts), next(parts)
        work = pairs.setdefault((forward.work, backward.work), len(codes) + len(pairs))
        return Step(forward.needs + backward.needs, work, forward.gives + backward.gives)

    steps = [list(map(step, actions)) for actions in schedule.ranks]
    return steps, examples + [overlap(examples[forward], examples[backward]) for forward, backward in pairs]


def _needs(schedule: Schedule, columns: Columns) -> list[tuple[int, ...]]:
    needs: list[tuple[int, ...]] = [(slot,) if slot >= 0 else () for slot in columns.inbox.tolist()]
    if columns.of_kind(Kind.UNSHARD).any():
        weights = _weights(schedule, columns)
        for i in np.flatnonzero(columns.of_kind(*COMPUTE)).tolist():
            needs[i] += (int(weights[i]),)
    return needs


def _gives(schedule: Schedule, columns: Columns) -> list[tuple[Give, ...]]:
    """What every elementary action hands to another, if it does; in a lowered schedule sends do between ranks."""
    gathers, remote = columns.of_kind(Kind.UNSHARD), columns.target != columns.rank
    slot, peer = np.where(gathers, _weights(schedule, columns), columns.outbox), columns.target
    peer, remote = np.where(gathers, columns.rank, peer), remote & ~gathers
    if columns.of_kind(*SENDS).any():
        slot = np.where(columns.of_kind(*COMPUTE) & remote, -1, slot)
    backward = columns.outbox >= schedule.num_stages * schedule.microbatches
    link = np.where(remote, 1 + backward * schedule.num_stages + columns.stage, 0)
    gives = zip(slot.tolist(), peer.tolist(), link.tolist(), strict=True)
    return [(give,) if give[0] >= 0 else () for give in gives]


def _weights(schedule: Schedule, columns: Columns) -> Ints:
    """The slots of gathered weights, behind those of inputs."""
    return inboxes(schedule) + columns.rank * schedule.num_stages + columns.stage

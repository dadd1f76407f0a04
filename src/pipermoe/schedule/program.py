"""A schedule with durations, compiled for simulation: what every action waits for, does and delivers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from pipermoe.schedule.action import COMPUTE, SENDS, Action, Kind, Schedule
from pipermoe.schedule.columns import KINDS, Columns, Ints, inboxes
from pipermoe.schedule.durations import WorkTable

Give = tuple[int, int, Any]  # data delivered: to a mailbox slot, of a rank, so many seconds after the action's end


class Step(NamedTuple):
    """An action as the simulations see it. A mailbox slot is an inbox (columns.py) or holds a stage's gathered weights.

    Seconds are numbers, or arrays with one number per candidate (schedule/batch.py).
    """

    needs: tuple[int, ...]
    compute: Any
    exchange: Any
    gives: tuple[Give, ...]
    lane: Any = None  # seconds on the collective lane, beside computation


class Program(NamedTuple):
    """Steps aligned with `schedule.ranks`."""

    schedule: Schedule
    steps: list[list[Step]]
    slots: int

    def check_finished(self, done: list[int]) -> None:
        """Raise ValueError, naming what waits, unless every rank did all its steps."""
        pairs = zip(self.schedule.ranks, done, strict=True)
        stuck = [f"rank {rank} at {acts[n]}" for rank, (acts, n) in enumerate(pairs) if n < len(acts)]
        if stuck:
            raise ValueError(f"schedule {self.schedule.name} cannot run to its end: {', '.join(stuck)}")


def compile_program(schedule: Schedule, work: WorkTable) -> Program:
    """Resolve every action's inputs, work and outputs once, so that simulating is a short loop."""
    columns = Columns.of(schedule)
    compute, exchange, lane = _seconds(schedule, columns, work)
    parts = map(Step, _needs(schedule, columns), compute, exchange, _gives(schedule, columns, work), lane)
    slots = inboxes(schedule) + schedule.num_ranks * schedule.num_stages
    if len(columns.rank) == sum(map(len, schedule.ranks)):
        return Program(schedule, [list(islice(parts, len(actions))) for actions in schedule.ranks], slots)
    together: dict[tuple[tuple[Kind, int], ...], tuple[Any, Any]] = {}

    def step(action: Action) -> Step:
        if not action.pair:
            return next(parts)
        forward, backward = next(parts), next(parts)
        stages = tuple((part.kind, part.stage) for part in action.pair)
        if stages not in together:
            together[stages] = work.work(action)
        return Step(forward.needs + backward.needs, *together[stages], forward.gives + backward.gives)

    return Program(schedule, [list(map(step, actions)) for actions in schedule.ranks], slots)


def _seconds(schedule: Schedule, columns: Columns, work: WorkTable) -> Iterator[Iterator[Any]]:
    """Of every elementary action: computation, exposed all-to-all, and seconds on the collective lane or None."""
    stages = range(schedule.num_stages)
    which = (columns.kind * schedule.num_stages + columns.stage).tolist()
    for tables, otherwise in ((work.compute, 0.0), (work.exchange, 0.0), (work.lane, None)):
        table = [tables[kind][stage] if kind in tables else otherwise for kind in KINDS for stage in stages]
        yield map(table.__getitem__, which)


def _needs(schedule: Schedule, columns: Columns) -> list[tuple[int, ...]]:
    needs: list[tuple[int, ...]] = [(slot,) if slot >= 0 else () for slot in columns.inbox.tolist()]
    if columns.of_kind(Kind.UNSHARD).any():
        weights = _weights(schedule, columns)
        for i in np.flatnonzero(columns.of_kind(*COMPUTE)).tolist():
            needs[i] += (int(weights[i]),)
    return needs


def _gives(schedule: Schedule, columns: Columns, work: WorkTable) -> Iterator[tuple[Give, ...]]:
    """What every elementary action hands to another, if it does; in a lowered schedule sends do between ranks."""
    gathers, remote = columns.of_kind(Kind.UNSHARD), columns.target != columns.rank
    slot, peer = np.where(gathers, _weights(schedule, columns), columns.outbox), columns.target
    peer, remote = np.where(gathers, columns.rank, peer), remote & ~gathers
    if columns.of_kind(*SENDS).any():
        slot = np.where(columns.of_kind(*COMPUTE) & remote, -1, slot)
    seconds = [0.0, *work.transfer, *work.transfer_backward]
    backward = columns.outbox >= schedule.num_stages * schedule.microbatches
    which = np.where(remote, 1 + backward * schedule.num_stages + columns.stage, 0)
    for each, to, link in zip(slot.tolist(), peer.tolist(), which.tolist(), strict=True):
        yield ((each, to, seconds[link]),) if each >= 0 else ()


def _weights(schedule: Schedule, columns: Columns) -> Ints:
    """The slots of gathered weights, behind those of inputs."""
    return inboxes(schedule) + columns.rank * schedule.num_stages + columns.stage

"""A schedule with durations, compiled for simulation: what every action waits for, does and delivers."""

from __future__ import annotations

from typing import Any, NamedTuple

from pipermoe.schedule.action import RECEIVES, SENDS, SHARDING, Action, Kind, Schedule
from pipermoe.schedule.durations import WorkTable

Give = tuple[int, int, Any]  # data delivered: to a mailbox slot, of a rank, so many seconds after the action's end


class Step(NamedTuple):
    """An action as the simulations see it. A mailbox slot holds one input: of a stage, micro-batch and direction.

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


class _Route(NamedTuple):
    """What all micro-batches of one kind of action on one stage (of one copy) share; slots count from micro-batch 0."""

    compute: Any
    exchange: Any
    needs: tuple[int, ...]
    weights: tuple[int, ...]
    gives: tuple[Give, ...]


def compile_program(schedule: Schedule, work: WorkTable) -> Program:
    """Resolve every action's inputs, work and outputs once, so that simulating is a short loop."""
    kinds = {action.kind for actions in schedule.ranks for action in actions}
    slots = 2 * schedule.num_stages * schedule.microbatches + schedule.num_ranks * schedule.num_stages
    compiler = _Compiler(schedule, work, lowered=bool(kinds & SENDS), sharded=Kind.UNSHARD in kinds)
    steps = [[compiler.step(action, rank) for action in actions] for rank, actions in enumerate(schedule.ranks)]
    return Program(schedule, steps, slots)


class _Compiler:
    def __init__(self, schedule: Schedule, work: WorkTable, lowered: bool, sharded: bool) -> None:
        self.schedule, self.work, self.lowered, self.sharded = schedule, work, lowered, sharded
        # A handful of each: the loop over micro-batches only adds.
        self.routes: dict[tuple[Kind, int, int], _Route] = {}
        self.pairs: dict[tuple[tuple[Kind, int], ...], tuple[Any, Any]] = {}

    def step(self, action: Action, rank: int) -> Step:
        if action.pair:
            parts = [self.step(part, rank) for part in action.pair]
            needs, gives = parts[0].needs + parts[1].needs, parts[0].gives + parts[1].gives
            return Step(needs, *self._pair_work(action), gives)
        route = self.routes.get((action.kind, action.stage, rank))
        if route is None:
            route = self.routes[action.kind, action.stage, rank] = self._route(action, rank)
        if action.kind in SHARDING:
            return Step((), 0.0, 0.0, route.gives, route.compute)
        compute, exchange, needs, weights, gives = route
        m = action.microbatch
        if needs:
            needs = (needs[0] + m,)
        if gives:
            slot, peer, seconds = gives[0]
            gives = ((slot + m, peer, seconds),)
        return Step(needs + weights, compute, exchange, gives)

    def _pair_work(self, action: Action) -> tuple[Any, Any]:
        stages = tuple((part.kind, part.stage) for part in action.pair)
        if stages not in self.pairs:
            self.pairs[stages] = self.work.work(action)
        return self.pairs[stages]

    def _route(self, action: Action, rank: int) -> _Route:
        kind, stage = action.kind, action.stage
        if kind in SHARDING:
            gives = ((self._weights(stage, rank), rank, 0.0),) if kind is Kind.UNSHARD else ()
            return _Route(self.work.lane[kind][stage], 0.0, (), (), gives)
        if kind in RECEIVES:
            return _Route(0.0, 0.0, (self._inbox(stage, kind is Kind.RECV_BACKWARD),), (), ())
        if kind in SENDS:
            backward = kind is Kind.SEND_BACKWARD
            return _Route(0.0, 0.0, (), (), self._give(action, rank, backward))
        compute, exchange = self.work.work(action)
        weights = (self._weights(stage, rank),) if self.sharded else ()
        if kind is Kind.WEIGHT_GRAD:
            return _Route(compute, exchange, (), weights, ())
        backward = kind is not Kind.FORWARD
        is_source = stage == (self.schedule.num_stages - 1 if backward else 0)
        needs = () if is_source else (self._inbox(stage, backward),)
        gives = self._give(action, rank, backward)
        if self.lowered and gives and gives[0][1] != rank:
            gives = ()  # its send delivers it
        return _Route(compute, exchange, needs, weights, gives)

    def _inbox(self, stage: int, backward: bool) -> int:
        """The mailbox slot of a stage's input, or of its output's gradient, for micro-batch 0."""
        return (backward * self.schedule.num_stages + stage) * self.schedule.microbatches

    def _weights(self, stage: int, rank: int) -> int:
        return 2 * self.schedule.num_stages * self.schedule.microbatches + rank * self.schedule.num_stages + stage

    def _give(self, action: Action, rank: int, backward: bool) -> tuple[Give, ...]:
        """What the action on `rank` hands to the next stage in its direction, if there is one."""
        stage = action.stage - 1 if backward else action.stage + 1
        if not 0 <= stage < self.schedule.num_stages:
            return ()
        peer = self.schedule.rank_of(stage, action.microbatch)
        transfer = self.work.transfer_backward if backward else self.work.transfer
        return ((self._inbox(stage, backward), peer, 0.0 if peer == rank else transfer[action.stage]),)

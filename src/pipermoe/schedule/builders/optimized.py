"""Schedules made for measured durations and a memory limit, instead of for the unit times of a paper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipermoe.schedule.action import Action, Kind, Schedule
from pipermoe.schedule.builders import RECIPES, build, illegal
from pipermoe.schedule.builders.squeeze import Limits, spine_peaks, squeeze
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.memory import peak_activation_bytes
from pipermoe.schedule.timeline import simulate
from pipermoe.specs.errors import UserError, describe_value

_LESS_PATIENCE = (0.5, 0.0)
_PROMISING = 3


def optimize(
    pipeline_parallel: int,
    microbatches: int,
    virtual_stages: int,
    durations: Durations,
    stage_bytes: Sequence[float] | None = None,
    memory_limit: float | Sequence[float] = math.inf,
) -> Schedule:
    """The fastest schedule found for these durations whose activations stay within `memory_limit` bytes per rank.

    `stage_bytes[s]` are the activations of one micro-batch on stage s (default: 1 each). Candidates are all named
    schedules with one copy of the model, and their orders list-scheduled anew with these durations and this memory. So
    the result is at least as fast as the best named schedule that fits; ties go to the named one.
    Raises UserError if nothing fits.
    """
    stages = pipeline_parallel * virtual_stages
    size = tuple(stage_bytes or (1.0,) * stages)
    limit = (memory_limit,) * pipeline_parallel if isinstance(memory_limit, int | float) else tuple(memory_limit)
    named = [
        build(name, pipeline_parallel, microbatches, virtual_stages)
        for name in RECIPES
        if not illegal(name, pipeline_parallel, microbatches, virtual_stages)
    ]
    named = [schedule for schedule in named if not schedule.mirror_rank]
    fitting = [schedule for schedule in named if _within(peak_activation_bytes(schedule, size), limit)]
    candidates = [*fitting, *_list_scheduled(named, Limits(size, limit), durations)]
    best = min(candidates, key=lambda schedule: simulate(schedule, durations).step_seconds, default=None)
    if best is None:
        orders = [_one_at_a_time(schedule) for schedule in named]
        least = min(max(spine_peaks(order, size)) for order in orders)
        rule = f"no schedule keeps its activations within this on every rank; the least that one needs is {least:.0f}"
        raise UserError(describe_value("", "memory_limit", memory_limit, rule))
    return best


def _list_scheduled(named: list[Schedule], limits: Limits, durations: Durations) -> Iterator[Schedule]:
    """Every named order with its backwards split and its weight gradients placed by these durations and limits.

    And, for every placement of stages, micro-batch after micro-batch: the order that needs the least memory, from which
    the list scheduler departs as far as the limit allows. The most promising are tried with less patience as well.
    """
    layouts = {schedule.stage_rank: _one_at_a_time(schedule) for schedule in named}
    distinct = {spines.ranks: spines for spines in (*map(_spines, named), *layouts.values())}
    legal = [s for s in distinct.values() if _within(spine_peaks(s, limits.stage), limits.rank)]
    patient = [squeeze(spines, limits, durations) for spines in legal]
    yield from patient
    seconds = [simulate(schedule, durations).step_seconds for schedule in patient]
    for _, spines in sorted(zip(seconds, legal, strict=True), key=lambda pair: pair[0])[:_PROMISING]:
        for patience in _LESS_PATIENCE:
            yield squeeze(spines, limits, durations, patience)


def _spines(schedule: Schedule) -> Schedule:
    """The order of forwards, input gradients and pairs alone."""

    def without_weight_grads(actions: Sequence[Action]) -> Iterator[Action]:
        for action in actions:
            if action.kind is Kind.BACKWARD:
                yield action._replace(kind=Kind.INPUT_GRAD)
            elif action.kind is not Kind.WEIGHT_GRAD:
                yield action

    ranks = tuple(tuple(without_weight_grads(actions)) for actions in schedule.ranks)
    return replace(schedule, name="optimized", ranks=ranks)


def _one_at_a_time(schedule: Schedule) -> Schedule:
    """Each micro-batch forward through all stages of a rank and back, before the next micro-batch."""

    def order(rank: int) -> Iterator[Action]:
        stages = schedule.stages_of(rank)
        for m in range(schedule.microbatches):
            yield from (Action(Kind.FORWARD, stage, m) for stage in stages)
            yield from (Action(Kind.INPUT_GRAD, stage, m) for stage in reversed(stages))

    return Schedule.of("optimized", schedule.microbatches, schedule.stage_rank, map(order, range(schedule.num_ranks)))


def _within(peaks: Sequence[float], limit: Sequence[float]) -> bool:
    return all(peak <= most * (1 + 1e-9) for peak, most in zip(peaks, limit, strict=True))

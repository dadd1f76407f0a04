"""A whole training run: how long T tokens take with failures and checkpoints, what they cost, how few ranks suffice."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from pipermoe.planner.candidate import candidate
from pipermoe.planner.job import Job
from pipermoe.planner.result import Campaign, Candidate
from pipermoe.planner.search import Field
from pipermoe.resources.goodput import Reliability, checkpoint_interval, goodput
from pipermoe.resources.parameters import total_parameters
from pipermoe.specs.base import Frozen
from pipermoe.specs.errors import NoPlanFits, UserError
from pipermoe.specs.units import format_count

_COUNT = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_PERIOD = {"hour": 3600.0, "day": 86_400.0, "week": 604_800.0}
_TARGET = re.compile(r"(\S+)\s+tokens\s+in\s+(\S+)\s+(hour|day|week)s?", re.IGNORECASE)


class Goal(Frozen):
    """A whole run of `tokens`; with `seconds` it must be done in that time. `price` is that of a device-hour."""

    tokens: float
    seconds: float | None = None
    price: float | None = None
    reliability: Reliability = Reliability()


def parse_target(text: str) -> tuple[float, float]:
    """Tokens and seconds of a target such as "100B tokens in 3 days". Raises `UserError`."""
    match = _TARGET.fullmatch(text.strip())
    if match is None:
        raise UserError(f'--target = {text!r}: write it like "100B tokens in 3 days"')
    return parse_tokens(match[1]), _number("--target", match[2]) * _PERIOD[match[3].lower()]


def parse_tokens(text: str) -> float:
    """Tokens of "15T" or "300B". Raises `UserError`."""
    count, prefix = (text, "") if text[-1:].isdigit() else (text[:-1], text[-1:].lower())
    if prefix not in _COUNT:
        raise UserError(f"--tokens = {text!r}: must be a number with k, M, B or T, such as 15T or 300B")
    return _number("--tokens", count) * _COUNT[prefix]


def _number(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e30:
        raise UserError(f"{option}: {text!r} must be a number above 0")
    return value


def campaign(job: Job, chosen: Candidate, goal: Goal) -> Campaign:
    """The goal's tokens trained with `chosen`. A checkpoint holds master weights and moments, spread evenly."""
    state, reliability = job.train.recipe.state, goal.reliability
    written = total_parameters(job.model) * ((state.master or state.weight) + state.moments) / job.world_size
    saving = written / reliability.checkpoint_bytes_per_s
    mtbf = reliability.mtbf_seconds(job.world_size)
    share = goodput(saving, mtbf, reliability.restart_seconds)
    seconds = goal.tokens / (chosen.tokens_per_second * share)
    hours = seconds * job.world_size / 3600
    return Campaign(
        tokens=goal.tokens,
        seconds=seconds,
        goodput=share,
        failures=seconds / mtbf,
        checkpoint_interval_seconds=checkpoint_interval(saving, mtbf),
        device_hours=hours,
        cost=None if goal.price is None else hours * goal.price,
    )


def sizes(job: Job) -> Iterator[int]:
    """Numbers of ranks worth asking: 1, 2, 3, 4, 6, 8, 12, ... of them or of whole hosts, up to the machine's."""
    limit, host = job.platform.levels[-1].ranks, job.platform.host.ranks
    ladder = sorted({width << doubling for width in (1, 3) for doubling in range(limit.bit_length())})
    yield from (size for size in ladder if size < host)
    yield from (size * host for size in ladder if size * host <= limit)


def fewest_ranks(job: Job, goal: Goal) -> int:
    """The smallest of `sizes` on which the best strategy reaches the goal in its time. Raises `NoPlanFits`."""
    most, nearest = goal.seconds or math.inf, math.inf
    for field in _fields(job):
        seconds = goal.tokens / job.train.tokens_per_step * float(field.bound.min())  # no strategy takes less
        if seconds <= most:
            chosen = _fastest(field)
            seconds = campaign(field.job, chosen, goal).seconds if chosen else math.inf
            if seconds <= most:
                return field.job.world_size
        nearest = min(nearest, seconds)
    if nearest == math.inf:
        raise NoPlanFits(f"no number of ranks of {job.platform.name} holds {job.model.name}")
    raise NoPlanFits(
        f"no number of ranks of {job.platform.name} trains {format_count(goal.tokens)} tokens in {most / 86_400:.3g} "
        f"days; the nearest takes at least {nearest / 86_400:.3g} days; allow more time, or more sequences than "
        f"{job.train.global_batch_size}"
    )


def fewest_device_hours(job: Job, goal: Goal) -> int:
    """The size, at most the job's own, whose best strategy takes the fewest device-hours. Raises `NoPlanFits`."""
    found = [
        (campaign(sized, chosen, goal).device_hours, sized.world_size)
        for sized, chosen in best_by_size(job, lambda size: size <= job.world_size)
    ]
    if not found:
        raise NoPlanFits(f"no number of ranks up to {job.world_size} holds {job.model.name}; give more with --ranks")
    return min(found)[1]


def best_by_size(job: Job, wanted: Callable[[int], bool] = lambda size: True) -> Iterator[tuple[Job, Candidate]]:
    """For every wanted size on which anything is legal and fits, the job of that size and its fastest strategy."""
    for field in _fields(job, wanted):
        if chosen := _fastest(field):
            yield field.job, chosen


def _fields(job: Job, wanted: Callable[[int], bool] = lambda size: True) -> Iterator[Field]:
    """The space of every wanted size on which anything is legal."""
    fields = (Field.of(replace(job, world_size=size)) for size in filter(wanted, sizes(job)))
    return (field for field in fields if len(field.space.heads))


def _fastest(field: Field) -> Candidate | None:
    """The fastest strategy that fits, if one does."""
    return next((candidate(field.job, field.space.strategy(found.place)) for found in field.best().best), None)

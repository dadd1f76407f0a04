"""A whole training run: how long T tokens take with failures and checkpoints, what they cost, how few ranks suffice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from pipermoe.planner.candidate import candidate
from pipermoe.planner.result import Campaign, Candidate
from pipermoe.planner.search import Field, Job
from pipermoe.resources.goodput import Reliability, checkpoint_interval, goodput
from pipermoe.resources.parameters import total_parameters
from pipermoe.resources.step import predict
from pipermoe.specs.base import Frozen
from pipermoe.specs.errors import NoPlanFits, UserError

_COUNT = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_PERIOD = {"hour": 3600.0, "day": 86_400.0, "week": 604_800.0}
_TARGET = re.compile(r"([\d.]+)\s*([kmbt]?)\s*tokens\s+in\s+([\d.]+)\s*(hour|day|week)s?", re.IGNORECASE)


class Target(Frozen):
    """So many tokens in so many seconds."""

    tokens: float
    seconds: float


def parse_target(text: str) -> Target:
    """The value of `--target`, such as "100B tokens in 3 days". Raises `UserError`."""
    match = _TARGET.fullmatch(text.strip())
    try:
        count, prefix, length, period = match.groups() if match else ("", "", "", "")
        target = Target(tokens=float(count) * _COUNT[prefix.lower()], seconds=float(length) * _PERIOD[period.lower()])
    except (ValueError, KeyError):
        raise UserError(f'--target = {text!r}: write it like "100B tokens in 3 days"') from None
    if not (target.tokens > 0 and target.seconds > 0):
        raise UserError(f"--target = {text!r}: tokens and time must be above 0")
    return target


def parse_tokens(text: str) -> float:
    """The value of `--tokens`, such as "15T". Raises `UserError`."""
    match = re.fullmatch(r"([\d.]+)\s*([kmbt]?)", text.strip(), re.IGNORECASE)
    try:
        tokens = float(match[1]) * _COUNT[match[2].lower()] if match else 0.0
    except ValueError:
        tokens = 0.0
    if tokens <= 0:
        raise UserError(f"--tokens = {text!r}: must be a number above 0, such as 15T or 300B")
    return tokens


def campaign(
    job: Job, chosen: Candidate, tokens: float, reliability: Reliability, price_per_hour: float | None = None
) -> Campaign:
    """`tokens` trained with `chosen`. A checkpoint holds what the optimizer updates and its moments, spread evenly."""
    state = job.train.recipe.state
    written = total_parameters(job.model) * ((state.master or state.weight) + state.moments) / job.world_size
    saving = written / reliability.checkpoint_bytes_per_s
    mtbf = reliability.mtbf_seconds(job.world_size)
    share = goodput(saving, mtbf, reliability.restart_seconds)
    seconds = tokens / (chosen.tokens_per_second * share)
    hours = seconds * job.world_size / 3600
    return Campaign(
        tokens=tokens,
        seconds=seconds,
        goodput=share,
        failures=seconds / mtbf,
        checkpoint_interval_seconds=checkpoint_interval(saving, mtbf),
        device_hours=hours,
        cost=None if price_per_hour is None else hours * price_per_hour,
    )


def sizes(job: Job) -> Iterator[int]:
    """Numbers of ranks worth asking: 1, 2, 3, 4, 6, 8, 12, ... of them or of whole hosts, up to the machine's."""
    limit, host = job.platform.levels[-1].ranks, job.platform.host.ranks
    ladder = sorted({width << doubling for width in (1, 3) for doubling in range(limit.bit_length())})
    yield from (size for size in ladder if size < host)
    yield from (size * host for size in ladder if size * host <= limit)


def fewest_ranks(job: Job, target: Target, reliability: Reliability) -> Job:
    """The smallest of `sizes` on which the best strategy reaches the target, as a job. Raises `NoPlanFits`."""
    best = 0.0
    for sized, chosen in best_by_size(job):
        run = campaign(sized, chosen, target.tokens, reliability)
        if run.seconds <= target.seconds:
            return sized
        best = max(best, target.seconds / run.seconds)
    raise NoPlanFits(
        f"no number of ranks of {job.platform.name} reaches the target; the nearest trains {best:.0%} of the tokens in "
        f"the time; allow more time or a larger global batch than {job.train.global_batch_size}"
    )


def fewest_device_hours(job: Job, tokens: float, reliability: Reliability) -> Job:
    """The size, at most the job's own, whose best strategy takes the fewest device-hours. Raises `NoPlanFits`."""
    found = [
        (campaign(sized, chosen, tokens, reliability).device_hours, sized)
        for sized, chosen in best_by_size(job, lambda size: size <= job.world_size)
    ]
    if not found:
        raise NoPlanFits(f"no number of ranks up to {job.world_size} holds {job.model.name}; give more with --gpus")
    return min(found, key=lambda each: each[0])[1]


def best_by_size(job: Job, wanted: Callable[[int], bool] = lambda size: True) -> Iterator[tuple[Job, Candidate]]:
    """For every wanted size on which anything is legal and fits, the job of that size and its fastest strategy."""
    for size in filter(wanted, sizes(job)):
        sized = replace(job, world_size=size)
        field = Field.of(sized)
        ranking = field.best() if len(field.space.heads) else None
        if ranking and ranking.best:
            strategy = field.space.strategy(ranking.best[0].place)
            yield sized, candidate(sized, strategy, predict(job.model, job.platform, job.train, strategy, job.imbalance))

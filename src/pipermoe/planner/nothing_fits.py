"""When nothing fits: the closest strategy, what it lacks and where, and what would help, each computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from pipermoe.planner.candidate import candidate
from pipermoe.planner.job import Job
from pipermoe.planner.search import Field
from pipermoe.specs.errors import NoPlanFits
from pipermoe.specs.report import MEMORY_CATEGORIES
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import GIB, MIB, format_bytes, format_number, format_seconds, option_bytes

DOUBLINGS = 6  # of the ranks, or halvings of the sequence, that are tried
MANY = 10  # GiB; a larger budget is a whole number of them


def nothing_fits(field: Field) -> NoPlanFits:
    """The error that says so: one line for the lack, one for each relaxation and its cost."""
    job, strategy = field.job, field.space.strategy(field.smallest())
    closest = candidate(job, strategy)
    largest = max(MEMORY_CATEGORIES, key=closest.memory_bytes.__getitem__)
    ranks, lack = format_number(job.world_size, "rank"), format_bytes(closest.peak_bytes - job.memory_budget_bytes)
    lines = [
        f"no strategy for {ranks} fits {format_bytes(job.memory_budget_bytes)} per rank{_spared(job)}; the closest, "
        f"{strategy_text(strategy)}, misses {lack} on rank {closest.worst_rank} "
        f"(most of it {largest}: {format_bytes(closest.memory_bytes[largest])})"
    ]
    for way, relaxed in _relaxations(job, closest.peak_bytes):
        lines.append(f"{way}: {_price(relaxed)}")
    return NoPlanFits("\n".join(lines))


def _spared(job: Job) -> str:
    return f" ({format_bytes(job.memory_bytes)} less --headroom {100 * job.headroom:g})" if job.headroom else ""


def _relaxations(job: Job, peak_bytes: int) -> Iterator[tuple[str, Field]]:
    """No headroom, more memory, more ranks, a shorter sequence: each the first step that is enough."""
    if job.memory_budget_bytes < peak_bytes <= job.memory_bytes:
        yield "--headroom 0", Field.of(replace(job, headroom=0.0))
    needed = peak_bytes / (1 - job.headroom)
    unit = GIB if needed > MANY * GIB else MIB
    enough = math.ceil(needed / unit) * unit
    yield f"--memory {option_bytes(enough)}", Field.of(replace(job, memory_bytes=enough))
    sizes = [job.world_size << n for n in range(1, DOUBLINGS + 1)]
    more = (replace(job, world_size=size) for size in sizes if size <= job.platform.levels[-1].ranks)
    if field := _first_that_fits(more):
        yield f"--ranks {field.job.world_size}", field
    lengths = [job.train.seq_len >> n for n in range(1, DOUBLINGS + 1)]
    shorter = (
        replace(job, train=job.train.model_copy(update={"seq_len": length})) for length in lengths if length >= 1
    )
    if field := _first_that_fits(shorter):
        yield f"--seq-len {field.job.train.seq_len}", field


def _first_that_fits(jobs: Iterator[Job]) -> Field | None:
    for job in jobs:
        field = Field.of(job)
        if len(field.space.heads) and field.promising() >= 0:
            return field
    return None


def _price(field: Field) -> str:
    [best] = field.best().best
    strategy = field.space.strategy(best.place)
    speed = field.job.train.tokens_per_step / best.seconds / field.job.world_size
    return (
        f"{strategy_text(strategy)}, {format_seconds(best.seconds)} a step, "
        f"{speed:,.0f} tokens/s per rank, {format_bytes(best.peak_bytes)}"
    )

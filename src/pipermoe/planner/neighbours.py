"""Strategies that differ from one in a single thing, and what each costs more or lacks: why not those.

A degree is halved or doubled (data parallelism follows), a schedule takes the fewest chunks that it can, ZeRO changes
for dense weights and experts together, one module is recomputed more or less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from pipermoe.planner.candidate import candidate
from pipermoe.planner.job import Job
from pipermoe.planner.result import Alternative, Candidate
from pipermoe.planner.search import ROUNDING
from pipermoe.resources.bound import step_bound
from pipermoe.resources.floor import memory_floor
from pipermoe.schedule.builders import RECIPES
from pipermoe.schedule.legality import POSSIBLE
from pipermoe.specs.legality import legal_mask
from pipermoe.specs.report import MEMORY_CATEGORIES, TERMS
from pipermoe.specs.strategy import RECOMPUTE_MODULES, Strategy
from pipermoe.specs.strategy_table import DISPATCHER_NAMES, RANK_ORDERS, RECOMPUTE_NAMES, StrategyTable
from pipermoe.specs.strategy_text import DEGREES, word

FOLLOWING = ("data_parallel", "expert_data_parallel")  # what the other degrees leave over
CONSIDERED = 4  # neighbours that differ in the same thing
MOST = 2  # of them that fit and are told


@dataclass(frozen=True, slots=True)
class Neighbour:
    """`strategy` differs in `axis`, which its `word` says."""

    axis: str
    strategy: Strategy

    @property
    def word(self) -> str:
        said = word(self.strategy, self.axis)
        return f"recompute {said}" if said in RECOMPUTE_NAMES else said


class Promise(NamedTuple):
    """A neighbour, and the seconds and bytes that its step and its peak do not undercut."""

    neighbour: Neighbour
    bound: float
    floor: float


def alternatives(job: Job, chosen: Candidate) -> tuple[Alternative, ...]:
    """The legal neighbours of the chosen strategy that promise most, of each kind, beside the chosen one.

    The lower bound of the step promises; of what does not fit comes only the first, if it would be faster.
    """
    found = list(_neighbours(chosen.strategy, job.platform.levels[0].ranks))
    table = StrategyTable.of([each.strategy for each in found])
    legal = np.flatnonzero(legal_mask(table, job.model, job.train, job.world_size, POSSIBLE))
    table = table.take(legal)
    bounds = step_bound(job.model, job.platform, job.train, table, job.imbalance)
    floors = memory_floor(job.model, job.train, table, job.imbalance)
    promises = sorted(zip(bounds.tolist(), legal.tolist(), floors.tolist(), strict=True))
    kinds: dict[str, list[Promise]] = {}
    for bound, row, floor in promises:
        kinds.setdefault(found[row].axis, []).append(Promise(found[row], bound, floor))
    compared = [one for kind in kinds.values() for one in _most_promising(job, kind[:CONSIDERED], chosen)]
    return tuple(sorted(compared, key=lambda one: (not one.fits, one.slower_seconds)))


def _most_promising(job: Job, promises: Sequence[Promise], chosen: Candidate) -> Iterator[Alternative]:
    fitting, tight = 0, 0
    for neighbour, bound, floor in promises:
        if fitting == MOST:
            return
        slower = bound * (1 - ROUNDING) >= chosen.step_seconds
        if floor > job.memory_budget_bytes and (tight or (fitting and slower)):
            continue  # it does not fit, and would not be told
        other = compare(job, neighbour, chosen)
        if other is None or (tight and not other.fits):
            continue
        if other.fits or other.slower_seconds < 0 or not fitting:
            fitting, tight = fitting + other.fits, tight + (not other.fits)
            yield other


def _neighbours(strategy: Strategy, ranks_per_node: int) -> Iterator[Neighbour]:
    for axis in DEGREES.values():
        value = getattr(strategy, axis)
        for other in (value // 2, 2 * value):
            yield from _changed(strategy, axis, {axis: other})
    for name, recipe in RECIPES.items():
        least, most = recipe.virtual_stages
        chunks = min(max(strategy.virtual_stages, least), most or strategy.virtual_stages)
        yield from _changed(strategy, "schedule", {"schedule": name, "virtual_stages": max(chunks, least)})
    for order in RANK_ORDERS:
        yield from _changed(strategy, "rank_order", {"rank_order": order})
    for level in range(4):
        yield from _changed(strategy, "zero_dense", {"zero_dense": level, "zero_expert": level})
    for dispatcher in DISPATCHER_NAMES:
        yield from _changed(strategy, "dispatcher", {"dispatcher": dispatcher, "ranks_per_copy": 1})
    once = max(1, ranks_per_node // strategy.expert_tensor_parallel)
    yield from _changed(strategy, "dispatcher", {"dispatcher": "deduplicated", "ranks_per_copy": once})
    for kind in ("none", "full"):
        yield from _changed(strategy, "recompute", {"recompute": kind, "recompute_modules": ()})
    for module in RECOMPUTE_MODULES:
        modules = tuple(sorted({*strategy.recompute_modules} ^ {module}))
        yield from _changed(strategy, "recompute", {"recompute": "selective", "recompute_modules": modules})


def _changed(strategy: Strategy, axis: str, change: dict[str, Any]) -> Iterator[Neighbour]:
    """The strategy with `change` where it makes another one that folds on as many ranks."""
    if axis in FOLLOWING:
        return
    values = strategy.model_dump() | change
    if values["pipeline_parallel"] * values["virtual_stages"] != strategy.num_stages:
        values["layer_split"] = ()
    dense = values["pipeline_parallel"] * values["context_parallel"] * values["tensor_parallel"]
    values["data_parallel"] = strategy.world_size // max(dense, 1)
    experts = values["expert_parallel"] * values["expert_tensor_parallel"]
    inside = values["data_parallel"] * values["context_parallel"] * values["tensor_parallel"]
    values["expert_data_parallel"] = inside // max(experts, 1)
    try:
        other = Strategy.model_validate(values)
    except ValidationError:
        return
    if other != strategy and other.world_size == strategy.world_size:
        yield Neighbour(axis, other)


def compare(job: Job, neighbour: Neighbour, chosen: Candidate) -> Alternative | None:
    """What the neighbour costs more than the chosen one, or how much it lacks; None where nothing changes."""
    strategy = neighbour.strategy
    row = StrategyTable.of([strategy])
    runs = any(legal_mask(row, job.model, job.train, job.world_size, rules)[0] for rules in job.runtimes)
    other = candidate(job, strategy)
    if other.peak_bytes > job.memory_budget_bytes:
        more = {name: other.memory_bytes[name] - chosen.memory_bytes[name] for name in MEMORY_CATEGORIES}
        return Alternative(
            change=neighbour.word,
            strategy=strategy,
            runs=runs,
            fits=False,
            rank=other.worst_rank,
            missing_bytes=other.peak_bytes - job.memory_budget_bytes,
            category=max(MEMORY_CATEGORIES, key=more.__getitem__),
            more_bytes=other.peak_bytes - chosen.peak_bytes,
            slower_seconds=other.step_seconds - chosen.step_seconds,
        )
    slower = {term: other.seconds[term] - chosen.seconds[term] for term in TERMS}
    if other.step_seconds == chosen.step_seconds and other.peak_bytes == chosen.peak_bytes:
        return None
    sign = 1 if other.step_seconds >= chosen.step_seconds else -1
    term = max(TERMS, key=lambda name: sign * slower[name])
    return Alternative(
        change=neighbour.word,
        strategy=strategy,
        runs=runs,
        fits=True,
        rank=other.worst_rank,
        more_bytes=other.peak_bytes - chosen.peak_bytes,
        slower_seconds=other.step_seconds - chosen.step_seconds,
        term=term,
        term_seconds=slower[term],
    )

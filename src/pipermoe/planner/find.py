"""From a model, a machine and a job to the fastest strategy that fits, with the reasons."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Unpack

from pipermoe.planner.answer import answer, plan_of
from pipermoe.planner.campaign import Goal, campaign
from pipermoe.planner.candidate import candidate
from pipermoe.planner.diagnosis import flat
from pipermoe.planner.explain import explain
from pipermoe.planner.job import Job, Limits
from pipermoe.planner.nothing_fits import nothing_fits
from pipermoe.planner.objectives import OBJECTIVES, Objective
from pipermoe.planner.pareto import pareto_front
from pipermoe.planner.result import Candidate, Explanation, PlanningResult, SearchCounts
from pipermoe.planner.search import Field, Ranking
from pipermoe.planner.space import require_legal_world
from pipermoe.planner.what_if import MORE_MEMORY
from pipermoe.resources.priced import require_priced
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.runtimes import Choice, executed_by
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

ROUGHLY = 0.02  # how nearly the best for more memory, or another machine, is found


def find_plan(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    *,
    world_size: int,
    objective: Objective = "step-time",
    goal: Goal | None = None,
    pareto: bool = False,
    runtime: Choice = "pipermoe",
    within: float = 0.0,
    top: int = 8,
    **limits: Unpack[Limits],
) -> PlanningResult:
    """The best strategy of `world_size` ranks as a Plan with its reasons, and up to `top` that come near.

    No strategy is faster than the best, or by the share `within` at most, which takes less to prove; the others are the
    fastest of what was simulated for the proof.

    With a `goal`, the whole run of its tokens; with `pareto`, the front of time against memory. `runtime` is what has
    to run the plan. Raises UserError when the ranks cannot be arranged or the runtime lacks the model, NoPlanFits when
    nothing fits the memory.
    """
    started = time.perf_counter()
    if top < 1:
        raise UserError(describe_value("", "top", top, "must be at least 1"))
    field = searched(model, platform, train, world_size, runtime, within, **limits)
    job, ranking = field.job, OBJECTIVES[objective](field, top)
    if not ranking.best:
        raise nothing_fits(field)
    ranked = [candidate(job, field.space.strategy(found.place)) for found in ranking.best]
    chosen, search_seconds = ranked[0], time.perf_counter() - started
    return answer(
        job,
        plan_of(job, chosen.strategy),
        ranked,
        _explained(field, chosen),
        objective=objective,
        search_seconds=search_seconds,
        counts=_counts(field, ranking),
        campaign=campaign(job, chosen, goal) if goal else None,
        pareto=pareto_front(field) if pareto else (),
    )


def searched(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    world_size: int,
    runtime: Choice = "pipermoe",
    within: float = 0.0,
    **limits: Unpack[Limits],
) -> Field:
    """The space of a job with its bounds. UserError where it has no price or its ranks no arrangement."""
    if not 0 <= within < 1:
        raise UserError(describe_value("", "within", f"{within:.0%}", "must be at least 0 and less than 100 %"))
    require_priced(model, platform, train, world_size)
    runtimes = executed_by(runtime, model, train)
    require_legal_world(model, train, world_size, runtimes)
    return Field.of(Job.of(model, platform, train, world_size, runtimes, within, **limits))


def _explained(field: Field, chosen: Candidate) -> Explanation:
    """With what only a search can say: what more memory, or a flat network, would choose."""
    rough = replace(field, job=replace(field.job, tolerance=max(ROUGHLY, field.job.tolerance)))
    roomier, seconds = _fastest(rough, field.job.memory_budget_bytes * MORE_MEMORY)
    return explain(
        field.job,
        chosen,
        unlimited=_fastest(rough, math.inf),
        roomier=roomier if seconds < chosen.step_seconds else chosen.strategy,  # it fits there, too
        blind=_fastest(Field.of(flat(rough.job)))[0],
    )


def _fastest(field: Field, memory_budget_bytes: float | None = None) -> tuple[Strategy, float]:
    """The fastest strategy within a budget, and its seconds."""
    [best] = field.best(memory_budget_bytes=memory_budget_bytes).best
    return field.space.strategy(best.place), best.seconds


def _counts(field: Field, ranking: Ranking) -> SearchCounts:
    return SearchCounts(
        considered=field.space.considered,
        illegal=field.space.illegal,
        redundant=field.space.redundant,
        not_fitting=ranking.not_fitting,
        pruned=ranking.pruned,
        simulated=ranking.simulated,
    )

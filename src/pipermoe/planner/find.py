"""From a model, a machine and a job to the fastest strategy that fits, with the reasons."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from pipermoe.planner.campaign import Goal, campaign
from pipermoe.planner.candidate import candidate
from pipermoe.planner.diagnosis import flat
from pipermoe.planner.error_band import error_band
from pipermoe.planner.explain import explain
from pipermoe.planner.inputs import plan_inputs
from pipermoe.planner.job import HEADROOM, Job, without_headroom
from pipermoe.planner.nothing_fits import nothing_fits
from pipermoe.planner.objectives import OBJECTIVES, Objective
from pipermoe.planner.pareto import pareto_front
from pipermoe.planner.result import Candidate, Explanation, PlanningResult, SearchCounts
from pipermoe.planner.search import Field, Ranking
from pipermoe.planner.space import require_legal_world
from pipermoe.planner.what_if import MORE_MEMORY
from pipermoe.resources.parameters import active_parameters, total_parameters
from pipermoe.resources.priced import require_priced
from pipermoe.resources.step import compute_slots, predict
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.plan import Plan
from pipermoe.specs.platform import Platform
from pipermoe.specs.runtimes import Choice, executed_by, runs_on
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig
from pipermoe.specs.units import format_number

ROUGHLY = 0.02  # how nearly the best for more memory, or another machine, is found


def find_plan(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    *,
    world_size: int,
    memory_budget_bytes: int | None = None,
    headroom: float = HEADROOM,
    imbalance: float = 1.0,
    objective: Objective = "step-time",
    goal: Goal | None = None,
    pareto: bool = False,
    runtime: Choice = "pipermoe",
    within: float = 0.0,
    top: int = 8,
) -> PlanningResult:
    """The best strategy of `world_size` ranks as a Plan with its reasons, and up to `top` that come near.

    No strategy is faster than the best, or by the share `within` at most, which takes less to prove; the others are the
    fastest of what was simulated for the proof.

    `memory_budget_bytes` is what tensors of one rank may take at their peak; by default the platform's memory less what
    is reserved; plans leave the share `headroom` of it free. `imbalance` is the busiest rank's rows over the mean. With
    a `goal`, the whole run of its tokens; with `pareto`, the front of time against memory. `runtime` is what has to run
    the plan. Raises UserError when the ranks cannot be arranged or the runtime lacks the model, NoPlanFits when nothing
    fits the budget.
    """
    started = time.perf_counter()
    if top < 1:
        raise UserError(describe_value("", "top", top, "must be at least 1"))
    field = searched(model, platform, train, world_size, memory_budget_bytes, headroom, imbalance, runtime, within)
    job = field.job
    ranking = OBJECTIVES[objective](field, top)
    if not ranking.best:
        raise nothing_fits(field)
    ranked = tuple(candidate(job, field.space.strategy(found.place)) for found in ranking.best)
    chosen = ranked[0]
    search_seconds = time.perf_counter() - started
    memory = memory_budget_bytes or platform.memory_budget_bytes
    return PlanningResult(
        model=model,
        platform=platform.name,
        train=train,
        world_size=world_size,
        compute_slots=compute_slots(platform, world_size),
        memory_budget_bytes=memory,
        headroom=headroom,
        imbalance=imbalance,
        objective=objective,
        parameters=total_parameters(model),
        active_parameters=active_parameters(model),
        counts=_counts(field, ranking),
        ranked=ranked,
        error_band=error_band(platform, world_size),
        explanation=_explained(field, chosen),
        campaign=campaign(job, chosen, goal) if goal else None,
        pareto=pareto_front(field) if pareto else (),
        plan=Plan(
            name=f"{model.name} on {format_number(world_size, 'rank')} of {platform.name}",
            platform=platform.name,
            memory_budget_bytes=memory,
            model=model,
            train=train,
            strategy=chosen.strategy,
            prediction=predict(model, platform, train, chosen.strategy, imbalance),
            runs_on=runs_on(model, train, chosen.strategy),
            inputs=plan_inputs(model, platform, train, world_size, memory_budget_bytes, headroom, imbalance),
        ),
        search_seconds=search_seconds,
    )


def searched(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    world_size: int,
    memory_budget_bytes: int | None = None,
    headroom: float = HEADROOM,
    imbalance: float = 1.0,
    runtime: Choice = "pipermoe",
    within: float = 0.0,
) -> Field:
    """The space of a job with its bounds. UserError where it has no price or its ranks no arrangement."""
    if imbalance < 1:
        rule = "is the busiest rank's rows over the mean: at least 1"
        raise UserError(describe_value("", "imbalance", imbalance, rule))
    if not 0 <= within < 1:
        raise UserError(describe_value("", "within", f"{within:.0%}", "must be at least 0 and less than 100 %"))
    require_priced(model, platform, train, world_size)
    runtimes = executed_by(runtime, model, train)
    require_legal_world(model, train, world_size, runtimes)
    memory = memory_budget_bytes or platform.memory_budget_bytes
    budget = without_headroom(memory, headroom)
    return Field.of(Job(model, platform, train, world_size, budget, imbalance, runtimes, within, headroom))


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

"""A strategy that was chosen elsewhere: checked, predicted and explained like one that the planner found."""

from __future__ import annotations

import time

from pipermoe.planner.candidate import candidate
from pipermoe.planner.error_band import error_band
from pipermoe.planner.explain import explain
from pipermoe.planner.inputs import plan_inputs
from pipermoe.planner.job import HEADROOM, Job, without_headroom
from pipermoe.planner.result import PlanningResult
from pipermoe.resources.parameters import active_parameters, total_parameters
from pipermoe.resources.priced import require_priced
from pipermoe.resources.step import compute_slots, predict
from pipermoe.schedule.legality import POSSIBLE
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.errors import UserError
from pipermoe.specs.legality import violations
from pipermoe.specs.plan import Plan
from pipermoe.specs.platform import Platform
from pipermoe.specs.runtimes import executed_by, runs_on
from pipermoe.specs.units import format_number


def plan_given(
    given: Configuration,
    platform: Platform,
    *,
    memory_budget_bytes: int | None = None,
    headroom: float = HEADROOM,
    imbalance: float = 1.0,
) -> Plan:
    """The plan that runs `given` on `platform`. UserError where it is not legal or cannot be priced."""
    model, train, strategy = given.model, given.train, given.strategy
    if broken := violations(strategy, model, train, strategy.world_size, POSSIBLE):
        raise UserError(broken[0])
    require_priced(model, platform, train, strategy.world_size)
    return Plan(
        name=f"{model.name} on {format_number(strategy.world_size, 'rank')} of {platform.name}, strategy given",
        platform=platform.name,
        memory_budget_bytes=memory_budget_bytes or platform.memory_budget_bytes,
        model=model,
        train=train,
        strategy=strategy,
        prediction=predict(model, platform, train, strategy, imbalance),
        runs_on=runs_on(model, train, strategy),
        inputs=plan_inputs(model, platform, train, strategy.world_size, memory_budget_bytes, headroom, imbalance),
    )


def explain_given(
    given: Configuration,
    platform: Platform,
    *,
    memory_budget_bytes: int | None = None,
    headroom: float = HEADROOM,
    imbalance: float = 1.0,
) -> PlanningResult:
    """The answer to `pipermoe predict`: the given strategy alone, explained. Errors as `plan_given`."""
    started = time.perf_counter()
    plan = plan_given(given, platform, memory_budget_bytes=memory_budget_bytes, headroom=headroom, imbalance=imbalance)
    model, train, strategy = given.model, given.train, given.strategy
    budget = without_headroom(plan.memory_budget_bytes, headroom)
    runtimes = tuple(rules for name in plan.runs_on for rules in executed_by(name, model, train))
    job = Job(model, platform, train, strategy.world_size, budget, imbalance, runtimes, headroom=headroom)
    chosen = candidate(job, strategy)
    return PlanningResult(
        model=model,
        platform=platform.name,
        train=train,
        world_size=strategy.world_size,
        compute_slots=compute_slots(platform, strategy.world_size),
        memory_budget_bytes=plan.memory_budget_bytes,
        headroom=headroom,
        imbalance=imbalance,
        objective="given",
        parameters=total_parameters(model),
        active_parameters=active_parameters(model),
        counts=None,
        ranked=(chosen,),
        error_band=error_band(platform, strategy.world_size),
        explanation=explain(job, chosen),
        plan=plan,
        search_seconds=time.perf_counter() - started,
    )

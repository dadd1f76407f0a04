"""A strategy that was chosen elsewhere: checked, predicted and explained like one that the planner found."""

from __future__ import annotations

import time
from typing import Unpack

from pipermoe.planner.answer import answer, plan_of
from pipermoe.planner.candidate import candidate
from pipermoe.planner.explain import explain
from pipermoe.planner.job import Job, Limits
from pipermoe.planner.result import PlanningResult
from pipermoe.resources.priced import require_priced
from pipermoe.schedule.legality import POSSIBLE
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.errors import UserError
from pipermoe.specs.legality import violations
from pipermoe.specs.plan import Plan
from pipermoe.specs.platform import Platform
from pipermoe.specs.runtimes import executed_by, runs_on


def plan_given(given: Configuration, platform: Platform, **limits: Unpack[Limits]) -> Plan:
    """The plan that runs `given` on `platform`. UserError where it is not legal or cannot be priced."""
    return _plan(given, _job(given, platform, **limits))


def explain_given(given: Configuration, platform: Platform, **limits: Unpack[Limits]) -> PlanningResult:
    """The answer to `pipermoe predict`: the given strategy alone, explained. Errors as `plan_given`."""
    started = time.perf_counter()
    job = _job(given, platform, **limits)
    plan, chosen = _plan(given, job), candidate(job, given.strategy)
    explanation = explain(job, chosen)
    return answer(job, plan, (chosen,), explanation, objective="given", search_seconds=time.perf_counter() - started)


def _job(given: Configuration, platform: Platform, **limits: Unpack[Limits]) -> Job:
    """For the runtimes that execute the strategy: neighbours are held to theirs."""
    model, train, strategy = given.model, given.train, given.strategy
    if broken := violations(strategy, model, train, strategy.world_size, POSSIBLE):
        raise UserError(broken[0])
    require_priced(model, platform, train, strategy.world_size)
    runtimes = tuple(rules for name in runs_on(model, train, strategy) for rules in executed_by(name, model, train))
    return Job.of(model, platform, train, strategy.world_size, runtimes, **limits)


def _plan(given: Configuration, job: Job) -> Plan:
    return plan_of(job, given.strategy, remark=", strategy given")

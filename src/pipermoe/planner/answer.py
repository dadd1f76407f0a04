"""What a search, or a strategy that is given, is answered with: the plan file, and all that is told of it."""

from __future__ import annotations

from collections.abc import Sequence

from pipermoe.planner.error_band import error_band
from pipermoe.planner.inputs import plan_inputs
from pipermoe.planner.job import Job
from pipermoe.planner.result import Campaign, Candidate, Explanation, PlanningResult, SearchCounts
from pipermoe.resources.parameters import active_parameters, total_parameters
from pipermoe.resources.step import compute_slots, predict
from pipermoe.specs.plan import Plan
from pipermoe.specs.runtimes import runs_on
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.units import format_number


def plan_of(job: Job, strategy: Strategy, remark: str = "") -> Plan:
    """The plan that runs `strategy`, with the source of every number in it."""
    return Plan(
        name=f"{job.model.name} on {format_number(job.world_size, 'rank')} of {job.platform.name}{remark}",
        platform=job.platform.name,
        memory_budget_bytes=job.memory_bytes,
        model=job.model,
        train=job.train,
        strategy=strategy,
        prediction=predict(job.model, job.platform, job.train, strategy, job.imbalance),
        runs_on=runs_on(job.model, job.train, strategy),
        inputs=plan_inputs(job),
    )


def answer(
    job: Job,
    plan: Plan,
    ranked: Sequence[Candidate],
    explanation: Explanation,
    *,
    objective: str,
    search_seconds: float,
    counts: SearchCounts | None = None,
    campaign: Campaign | None = None,
    pareto: tuple[Candidate, ...] = (),
) -> PlanningResult:
    """Everything about `plan`, whose strategy is the first of `ranked`."""
    return PlanningResult(
        model=job.model,
        platform=job.platform.name,
        train=job.train,
        world_size=job.world_size,
        compute_slots=compute_slots(job.platform, job.world_size),
        memory_budget_bytes=job.memory_bytes,
        headroom=job.headroom,
        imbalance=job.imbalance,
        objective=objective,
        parameters=total_parameters(job.model),
        active_parameters=active_parameters(job.model),
        counts=counts,
        search_seconds=search_seconds,
        ranked=tuple(ranked),
        error_band=error_band(job.platform, job.world_size),
        explanation=explanation,
        campaign=campaign,
        pareto=pareto,
        plan=plan,
    )

"""From a model, a machine and a job to the fastest strategy that fits, with the reasons."""

from __future__ import annotations

import time

from pipermoe.planner.explain import alternatives, bottleneck, candidate
from pipermoe.planner.inputs import plan_inputs
from pipermoe.planner.result import PlanningResult, SearchCounts
from pipermoe.planner.search import Field, Job
from pipermoe.planner.space import require_legal_world
from pipermoe.resources.parameters import total_parameters
from pipermoe.resources.priced import require_priced
from pipermoe.resources.step import compute_slots, predict
from pipermoe.specs.errors import NoPlanFits, UserError, describe_value
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.plan import Plan
from pipermoe.specs.platform import Platform
from pipermoe.specs.report import MEMORY_CATEGORIES
from pipermoe.specs.train import TrainConfig
from pipermoe.specs.units import MIB, format_bytes


def find_plan(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    *,
    world_size: int,
    memory_budget_bytes: int | None = None,
    top: int = 8,
) -> PlanningResult:
    """The `top` fastest strategies of `world_size` ranks, exactly ranked, the first of them as a Plan.

    `memory_budget_bytes` is what tensors of one rank may take at their peak; by default the platform's memory less what
    is reserved. Raises UserError when the ranks cannot be arranged, NoPlanFits when nothing fits the budget.
    """
    started = time.perf_counter()
    budget = memory_budget_bytes or platform.device.memory_bytes - platform.reserved_bytes
    if top < 1:
        raise UserError(describe_value("", "top", top, "must be at least 1"))
    require_priced(model, platform, train, world_size)
    require_legal_world(model, train, world_size)
    job = Job(model, platform, train, world_size, budget)
    field = Field.of(job)
    ranking = field.best(top)
    if not ranking.best:
        raise NoPlanFits(_nothing_fits(field))
    strategies = [field.space.strategy(found.place) for found in ranking.best]
    predictions = [predict(model, platform, train, strategy) for strategy in strategies]
    ranked = tuple(candidate(job, *pair) for pair in zip(strategies, predictions, strict=True))
    chosen = ranked[0]
    return PlanningResult(
        model=model,
        platform=platform.name,
        train=train,
        world_size=world_size,
        compute_slots=compute_slots(platform, world_size),
        memory_budget_bytes=budget,
        parameters=total_parameters(model),
        counts=SearchCounts(
            considered=field.space.considered,
            illegal=field.space.illegal,
            redundant=field.space.redundant(field.space.select()),
            not_fitting=ranking.not_fitting,
            pruned=ranking.pruned,
            simulated=ranking.simulated,
        ),
        ranked=ranked,
        bottleneck=bottleneck(field, chosen),
        alternatives=alternatives(field, chosen),
        plan=Plan(
            name=f"{model.name} on {world_size} ranks of {platform.name}",
            platform=platform.name,
            memory_budget_bytes=budget,
            model=model,
            train=train,
            strategy=chosen.strategy,
            prediction=predictions[0],
            inputs=plan_inputs(
                model, platform, train, world_size, budget, budget_given=memory_budget_bytes is not None
            ),
        ),
        search_seconds=time.perf_counter() - started,
    )


def _nothing_fits(field: Field) -> str:
    """The strategy that comes closest, what it lacks and where, and the ways out."""
    job, strategy = field.job, field.space.strategy(field.smallest())
    report = predict(job.model, job.platform, job.train, strategy)
    worst = max(report.ranks, key=lambda rank: (rank.peak_bytes, -rank.rank))
    missing = (worst.peak_bytes - job.memory_budget_bytes) / MIB
    largest = max(MEMORY_CATEGORIES, key=lambda name: worst.memory_bytes[name])
    needed = -(-worst.peak_bytes // MIB)
    return (
        f"no strategy for {job.world_size} ranks fits {format_bytes(job.memory_budget_bytes)} per rank; the closest, "
        f"{strategy.compact()} mbs{strategy.micro_batch_size} {strategy.schedule} recompute {strategy.recompute}, "
        f"misses {missing:.1f} MiB on rank {worst.rank} (most of it {largest}: "
        f"{format_bytes(worst.memory_bytes[largest])}); use more ranks, shorter sequences or --memory {needed}MiB"
    )

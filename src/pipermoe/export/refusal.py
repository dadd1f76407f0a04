"""The refusal of a plan that a runtime cannot execute: the rule, the nearest strategy that it can, and its cost."""

from __future__ import annotations

from collections.abc import Sequence

from pipermoe.resources.priced import require_priced
from pipermoe.resources.step import predict
from pipermoe.schedule.legality import POSSIBLE
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.legality import Changes, Job, Rule
from pipermoe.specs.platform import Platform
from pipermoe.specs.runtimes import Runtime
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import GIB, format_bytes


def require_executable(
    runtime: Runtime, wanted: Configuration, *, where: str = "", platform: Platform | None = None
) -> None:
    """UserError unless `runtime` can execute `wanted`: the rule, the nearest strategy, its cost on `platform`."""
    broken = first_broken(runtime.rules, wanted)
    if broken is None:
        return
    nearest = nearest_executable(runtime.rules, wanted) if broken.change else None
    key, value, reason = broken.sentence(wanted.strategy, job_of(wanted))
    rule = f"{runtime.title}: {reason}"
    if nearest is not None:
        rule += f"; nearest: {strategy_text(nearest.strategy)!r}, {_cost(wanted, nearest, platform)}"
    raise UserError(describe_value(where, key, value, rule))


def job_of(wanted: Configuration) -> Job:
    return Job(wanted.model, wanted.train, wanted.strategy.world_size)


def first_broken(rules: Sequence[Rule], wanted: Configuration) -> Rule | None:
    job = job_of(wanted)
    return next((rule for rule in rules if not rule.accepts(wanted.strategy, job)), None)


def nearest_executable(rules: Sequence[Rule], wanted: Configuration) -> Configuration | None:
    """`wanted` with the strategy changed until it obeys every rule, those of legality too; None if none does."""
    for _ in range(len(rules) + 1):  # a change may break another rule, but never the same one again
        broken = first_broken(rules, wanted)
        if broken is None:
            return wanted if first_broken(POSSIBLE, wanted) is None else None
        if broken.change is None:
            return None
        changed = wanted.strategy.model_dump() | broken.change(wanted.strategy, job_of(wanted))
        if broken_split(changed):
            changed["layer_split"] = ()
        wanted = wanted.model_copy(update={"strategy": Strategy.model_validate(changed)})
    return None


def broken_split(strategy: Changes) -> bool:
    """Whether the split of layers is for another number of stages."""
    stages = strategy["pipeline_parallel"] * strategy["virtual_stages"]  # type: ignore[operator]
    return len(strategy["layer_split"]) not in (0, stages)  # type: ignore[arg-type]


def _cost(wanted: Configuration, nearest: Configuration, platform: Platform | None) -> str:
    """What the nearest strategy is predicted to take beside the wanted one, and whether it fits; or why no price."""
    if platform is None:
        return "not priced without --platform"
    try:
        require_priced(wanted.model, platform, wanted.train, wanted.strategy.world_size)
        steps = [predict(one.model, platform, one.train, one.strategy) for one in (nearest, wanted)]
    except UserError as error:
        return f"not priced: {error}"
    peaks = [max(rank.peak_bytes for rank in step.ranks) for step in steps]
    budget = platform.memory_budget_bytes
    lack = f", which its {format_bytes(budget)} do not hold" if peaks[0] > budget else ""
    return (
        f"predicted {steps[0].step_seconds:.4g} s a step and {peaks[0] / GIB:.4g} GiB on {platform.name}{lack} "
        f"(this plan: {steps[1].step_seconds:.4g} s, {peaks[1] / GIB:.4g} GiB)"
    )

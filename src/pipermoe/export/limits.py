"""What a target cannot express: the refusal, and the nearest strategy that it can, with its predicted cost.

A target lists its limits. Each says when it holds, why, and which change of strategy meets it; the nearest expressible
strategy is what all changes in turn lead to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipermoe.resources.priced import require_priced
from pipermoe.resources.step import predict
from pipermoe.schedule.builders import illegal
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.legality import LEGAL, violations
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import GIB, format_bytes

Changes = dict[str, object]  # fields of Strategy and their new values


@dataclass(frozen=True, slots=True)
class Limit:
    """`change` gives the fields of the nearest strategy that meets the limit; without it no strategy does."""

    key: str  # as in a plan file: "strategy.schedule", "train.precision"
    holds: Callable[[Configuration], bool]
    reason: str
    change: Callable[[Configuration], Changes] | None = None


def require_expressible(
    target: str, limits: Sequence[Limit], wanted: Configuration, *, where: str = "", platform: Platform | None = None
) -> None:
    """UserError unless `target` can express `wanted`: the limit, the nearest strategy, its cost on `platform`."""
    broken = next((limit for limit in limits if not limit.holds(wanted)), None)
    if broken is None:
        return
    nearest = nearest_expressible(limits, wanted) if broken.change else None
    rule = f"{target}: {broken.reason}"
    if nearest is not None:
        rule += f"; nearest: {strategy_text(nearest.strategy)!r}, {_cost(wanted, nearest, platform)}"
    raise UserError(describe_value(where, broken.key, _value(wanted, broken.key), rule))


def nearest_expressible(limits: Sequence[Limit], wanted: Configuration) -> Configuration | None:
    """`wanted` with the strategy changed until it meets every limit and every rule of legality; None if none does."""
    for _ in range(len(limits) + 1):  # a change may break another limit, but never the same one again
        broken = next((limit for limit in limits if not limit.holds(wanted)), None)
        if broken is None:
            return wanted if is_legal(wanted) else None
        if broken.change is None:
            return None
        changed = wanted.strategy.model_dump() | broken.change(wanted)
        if broken_split(changed):
            changed["layer_split"] = ()
        wanted = wanted.model_copy(update={"strategy": Strategy.model_validate(changed)})
    return None


def broken_split(strategy: Changes) -> bool:
    """Whether the split of layers is for another number of stages."""
    stages = strategy["pipeline_parallel"] * strategy["virtual_stages"]  # type: ignore[operator]
    return len(strategy["layer_split"]) not in (0, stages)  # type: ignore[arg-type]


def is_legal(wanted: Configuration) -> bool:
    strategy = wanted.strategy
    if violations(strategy, wanted.model, wanted.train, strategy.world_size, LEGAL):
        return False
    return illegal(strategy.schedule, strategy.pipeline_parallel, microbatches(wanted), strategy.virtual_stages) is None


def microbatches(wanted: Configuration) -> int:
    """Micro-batches of a data-parallel rank in a step."""
    return wanted.strategy.microbatches(wanted.train.global_batch_size)


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


def _value(wanted: Configuration, key: str) -> object:
    value: object = wanted
    for name in key.split("."):
        value = getattr(value, name)
    return list(value) if isinstance(value, tuple) else value

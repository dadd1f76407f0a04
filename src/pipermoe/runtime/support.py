"""What this runtime can build and run. Everything else is refused before a process starts."""

from __future__ import annotations

from collections.abc import Iterator

from pipermoe.layout.policies import POLICIES
from pipermoe.schedule.builders import problem
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.legality import LEGAL, violations
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.runtimes.own import EXECUTABLE, unbuildable_parts, untrainable_parts
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import Mechanism, TrainConfig


def check_supported(model: ModelSpec, train: TrainConfig, strategy: Strategy) -> None:
    """Raise `UserError` with one line for each reason why this runtime cannot train `model` like that."""
    broken = violations(strategy, model, train, strategy.world_size, (*LEGAL, *EXECUTABLE))
    reasons = [*broken, *_described(untrainable_parts(model))]
    microbatches = strategy.microbatches(train.global_batch_size)
    found = problem(strategy.schedule, strategy.pipeline_parallel, microbatches, strategy.virtual_stages)
    if found and not reasons:  # which may be why
        key, value, rule = found
        reasons.append(describe_value("", f"strategy.{key}" if key in Strategy.model_fields else key, value, rule))
    reasons += _unmovable(train, strategy)
    _refuse(reasons)


def check_model(model: ModelSpec) -> None:
    """Raise `UserError` for what modules/model.py cannot build, whatever the strategy."""
    _refuse(_described(unbuildable_parts(model)))


def check_layable(strategy: Strategy, mechanism: Mechanism | None) -> None:
    """Raise `UserError` for what experts do not move with."""
    if reason := _unlayable(strategy, mechanism):
        raise UserError(reason)


def _unlayable(strategy: Strategy, mechanism: Mechanism | None) -> str:
    """What experts do not move with, or nothing."""
    if strategy.dispatcher != "all_to_all":
        rule = 'experts that move need dispatcher = "all_to_all"'
        return describe_value("", "strategy.dispatcher", strategy.dispatcher, rule)
    if strategy.stage_homes > 1:
        rule = "holds every stage on two ranks, whose experts do not move together; use dualpipe-v"
        return describe_value("", "strategy.schedule", strategy.schedule, rule)
    sharded = strategy.zero_expert if strategy.expert_data_parallel > 1 else 0
    most = {"bound": 0, "decoupled": 1, "sparse": 1, None: 3}[mechanism]
    if sharded > most:
        rule = f'experts that move by balance.mechanism = "{mechanism}" have at most {most}'
        return describe_value("", "strategy.zero_expert", sharded, rule)
    return ""


def _unmovable(train: TrainConfig, strategy: Strategy) -> Iterator[str]:
    """What stands in the way of experts that move."""
    balance = train.balance
    if balance.policy not in POLICIES:
        yield describe_value("", "balance.policy", balance.policy, f"must be one of {', '.join(POLICIES)}")
    elif balance.lays_out:
        if strategy.expert_parallel == 1:
            rule = "experts have nowhere to move with expert_parallel = 1; "
            if balance.moves:
                yield describe_value("", "balance.policy", balance.policy, rule + "use static")
            else:
                yield describe_value("", "balance.spill_above", balance.spill_above, rule + "leave it out")
        if reason := _unlayable(strategy, balance.mechanism if balance.moves else None):
            yield reason


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise UserError("\n".join(reasons))


def _described(parts: Iterator[tuple[str, object, str]]) -> list[str]:
    return [describe_value("", *part) for part in parts]

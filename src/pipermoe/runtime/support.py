"""What this runtime can build and run. Everything else is refused before a process starts."""

from __future__ import annotations

from collections.abc import Iterator

from pipermoe.layout.policies import POLICIES
from pipermoe.runtime.layout.lay_out import unlayable
from pipermoe.schedule.builders import illegal
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.legality import violations
from pipermoe.specs.model import LatentAttention, ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig


def check_supported(model: ModelSpec, train: TrainConfig, strategy: Strategy) -> None:
    """Raise `UserError` with one line for each reason why this runtime cannot train `model` like that."""
    reasons = [*violations(strategy, model, train, strategy.world_size), *_reasons(model)]
    microbatches = strategy.microbatches(train.global_batch_size)
    problem = illegal(strategy.schedule, strategy.pipeline_parallel, microbatches, strategy.virtual_stages)
    if problem and not reasons:  # which may be why
        reasons.append(problem)
    stretch = model.attention.rope_stretch
    if stretch:  # a dry run may have it: it changes no count
        rule = "this runtime does not turn positions like that; leave it out, or use yarn"
        reasons.append(describe_value("", "attention.rope_stretch", stretch, rule))
    reasons += _unmovable(train, strategy)
    _refuse(reasons)


def check_model(model: ModelSpec) -> None:
    """Raise `UserError` for what modules/model.py cannot build, whatever the strategy."""
    _refuse(_reasons(model))


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
        if problem := unlayable(strategy, balance.mechanism if balance.moves else None):
            yield problem


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise UserError("\n".join(reasons))


def _reasons(model: ModelSpec) -> list[str]:
    return [describe_value("", key, value, rule) for key, value, rule in _unsupported(model)]


def _unsupported(model: ModelSpec) -> list[tuple[str, object, str]]:
    """(key, value, rule) of every part of the model that modules/model.py does not build."""
    attention = model.attention
    wanted: list[tuple[str, object, object, str]] = [
        (
            "norms_per_layer",
            model.norms_per_layer,
            2,
            "this runtime builds 2, before attention and before the experts",
        ),
    ]
    if isinstance(attention, LatentAttention):
        wanted.append(("attention.indexer", attention.indexer, None, "selected keys are not implemented; leave it out"))
        rule = "latent attention has positions in every layer; leave it out"
        wanted.append(("no_rope_layers", model.no_rope_layers, (), rule))
        rotated = "qk_rope_head_dim"
    else:
        rotated = "rotary_dim" if attention.rotary_dim else "head_dim"
    if attention.rotated % 2:
        wanted.append((f"attention.{rotated}", attention.rotated, 0, "must be even: rotary positions turn pairs"))
    return [(key, value, rule) for key, value, accepted, rule in wanted if value != accepted]

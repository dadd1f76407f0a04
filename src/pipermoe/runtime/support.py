"""What this runtime can build and run. Everything else is refused before a process starts."""

from __future__ import annotations

from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.legality import EXECUTABLE, violations
from pipermoe.specs.model import GroupedQueryAttention, ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig


def check_supported(model: ModelSpec, train: TrainConfig, strategy: Strategy) -> None:
    """Raise `UserError` with one line for each reason why this runtime cannot train `model` like that."""
    _refuse([*violations(strategy, model, train, strategy.world_size, EXECUTABLE), *_reasons(model)])


def check_model(model: ModelSpec) -> None:
    """Raise `UserError` for what runtime/model.py cannot build, whatever the strategy."""
    _refuse(_reasons(model))


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise UserError("\n".join(reasons))


def _reasons(model: ModelSpec) -> list[str]:
    return [describe_value("", key, value, rule) for key, value, rule in _unsupported(model)]


def _unsupported(model: ModelSpec) -> list[tuple[str, object, str]]:
    """(key, value, rule) of every part of the model that runtime/model.py does not build."""
    attention, moe, router = model.attention, model.moe, model.moe.router
    only = "this runtime builds {} only"
    wanted: list[tuple[str, object, object, str]] = [
        ("moe.expert_matrices", moe.expert_matrices, 3, only.format("gated experts, 3,")),
        ("moe.expert_bias", moe.expert_bias, False, only.format("experts without bias")),
        ("moe.router.correction_bias", router.correction_bias, "none", "load-driven bias is not implemented; use none"),
        ("moe.router.num_groups", router.num_groups, 1, only.format("routing over all experts, 1,")),
        ("dense_matrices", model.dense_matrices, 3, only.format("gated blocks, 3,")),
        ("mlp_bias", model.mlp_bias, False, only.format("blocks without bias")),
        ("norms_per_layer", model.norms_per_layer, 2, only.format("2")),
        ("norm_bias", model.norm_bias, False, only.format("RMSNorm")),
        ("head_bias", model.head_bias, False, only.format("heads without bias")),
        ("local_attention", model.local_attention, None, only.format("attention over the whole sequence")),
        ("mtp_layers", model.mtp_layers, 0, "multi-token prediction is not implemented; use 0"),
    ]
    if isinstance(attention, GroupedQueryAttention):
        wanted.append(("attention.sinks", attention.sinks, False, "attention sinks are not implemented"))
        if attention.qk_norm == "l2":
            wanted.append(("attention.qk_norm", "l2", "none", 'use "none", "head" or "full"'))
        if attention.head_dim % 2:
            wanted.append(("attention.head_dim", attention.head_dim, 0, "must be even: rotary positions turn pairs"))
    else:
        wanted.append(("attention.kind", attention.kind, "gqa", only.format('"gqa"')))
    return [(key, value, rule) for key, value, accepted, rule in wanted if value != accepted]

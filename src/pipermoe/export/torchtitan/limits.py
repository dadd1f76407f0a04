"""What torchtitan cannot express."""

from __future__ import annotations

from pipermoe.export.limits import Limit
from pipermoe.export.torchtitan.names import MODELS, NUMBERS
from pipermoe.specs.catalogue import is_catalogue_entry
from pipermoe.specs.configuration import Configuration


def _is_registered(plan: Configuration) -> bool:
    return plan.model.name in MODELS and is_catalogue_entry(plan.model)


def _expert_tensor_parallel(plan: Configuration) -> int:
    """Experts have ranks of their own, or are split as attention is."""
    return 1 if plan.strategy.expert_parallel > 1 else plan.strategy.tensor_parallel


def _level(plan: Configuration) -> int:
    """The nearest level of FSDP2, which always shards gradients."""
    return max(2, *plan.strategy.sharding_levels)


LIMITS: tuple[Limit, ...] = (
    Limit("model.name", _is_registered, f"registers {', '.join(MODELS)} of the catalogue, as they are there"),
    Limit("train.precision", lambda plan: plan.train.precision in NUMBERS, f"trains in {', '.join(NUMBERS)}"),
    Limit(
        "train.state_bytes", lambda plan: plan.train.state_bytes is None, "keeps weights, gradients and moments in fp32"
    ),
    Limit("train.capacity_factor", lambda plan: plan.train.capacity_factor == 0, "drops no tokens"),
    Limit(
        "strategy.recompute",
        lambda plan: plan.strategy.recompute != "selective",
        "chooses what to recompute by operation, not by module",
        lambda plan: {"recompute": "full", "recompute_modules": ()},
    ),
    Limit(
        "strategy.schedule",
        lambda plan: plan.strategy.schedule != "dualpipe",
        "holds one copy of every stage",
        lambda plan: {"schedule": "dualpipe-v", "virtual_stages": 2},
    ),
    Limit(
        "strategy.schedule",
        lambda plan: plan.strategy.pipeline_parallel > 1 or plan.strategy.schedule == "1f1b",
        "accumulates gradients one micro-batch after the other without a pipeline",
        lambda plan: {"schedule": "1f1b", "virtual_stages": 1},
    ),
    Limit(
        "strategy.expert_tensor_parallel",
        lambda plan: plan.strategy.expert_tensor_parallel == _expert_tensor_parallel(plan),
        "has no tensor parallelism of experts beside expert_parallel, and that of attention without",
        lambda plan: {
            "expert_tensor_parallel": _expert_tensor_parallel(plan),
            "expert_data_parallel": plan.strategy.ranks_per_stage
            // (plan.strategy.expert_parallel * _expert_tensor_parallel(plan)),
        },
    ),
    Limit(
        "strategy.zero_dense",
        lambda plan: (
            plan.strategy.sharding_levels in (set(), {2}, {3})
            or (plan.strategy.sharding_levels == {0} and plan.strategy.expert_parallel == 1)
        ),
        "shards with FSDP2: ZeRO-2 or 3 of dense and expert parameters alike, or 0 without expert_parallel",
        lambda plan: {
            "zero_dense": _level(plan) if plan.strategy.data_parallel > 1 else 0,
            "zero_expert": _level(plan) if plan.strategy.expert_data_parallel > 1 else 0,
        },
    ),
    Limit(
        "strategy.dispatcher",
        lambda plan: plan.strategy.dispatcher == "all_to_all",
        "chooses another dispatcher where a model is registered",
        lambda plan: {"dispatcher": "all_to_all"},
    ),
)

"""What DeepSpeed with AutoEP cannot express."""

from __future__ import annotations

from pipermoe.export.deepspeed.names import PRECISIONS, PRESETS
from pipermoe.export.limits import Changes, Limit
from pipermoe.specs.catalogue import is_catalogue_entry
from pipermoe.specs.configuration import Configuration


def _as_data_parallel(plan: Configuration) -> Changes:
    """The ranks of pipeline and sequence as further data-parallel ranks; experts stay on as many ranks as they are."""
    strategy = plan.strategy
    data_parallel = strategy.data_parallel * strategy.pipeline_parallel * strategy.context_parallel
    return {
        "pipeline_parallel": 1,
        "virtual_stages": 1,
        "context_parallel": 1,
        "schedule": "1f1b",
        "layer_split": (),
        "data_parallel": data_parallel,
        "expert_data_parallel": data_parallel
        * strategy.tensor_parallel
        // (strategy.expert_parallel * strategy.expert_tensor_parallel),
    }


def _one_level(plan: Configuration) -> Changes:
    return dict.fromkeys(("zero_dense", "zero_expert"), max(plan.strategy.sharding_levels))


LIMITS: tuple[Limit, ...] = (
    Limit(
        "model.name",
        lambda plan: plan.model.name in PRESETS and is_catalogue_entry(plan.model),
        f"AutoEP has presets of {', '.join(PRESETS)} of the catalogue, as they are there",
    ),
    Limit("train.precision", lambda plan: plan.train.precision in PRECISIONS, f"trains in {', '.join(PRECISIONS)}"),
    Limit("train.state_bytes", lambda plan: plan.train.state_bytes is None, "is exported with the usual state only"),
    Limit("train.capacity_factor", lambda plan: plan.train.capacity_factor == 0, "drops no tokens under AutoEP"),
    Limit(
        "strategy.pipeline_parallel",
        lambda plan: plan.strategy.pipeline_parallel == 1,
        "has no pipeline of Hugging Face models",
        _as_data_parallel,
    ),
    Limit(
        "strategy.context_parallel",
        lambda plan: plan.strategy.context_parallel == 1,
        "splits sequences over heads (Ulysses), not over context_parallel ranks",
        _as_data_parallel,
    ),
    Limit(
        "strategy.schedule",
        lambda plan: plan.strategy.schedule == "1f1b" and plan.strategy.virtual_stages == 1,
        "accumulates gradients one micro-batch after the other",
        _as_data_parallel,
    ),
    Limit(
        "strategy.expert_tensor_parallel",
        lambda plan: plan.strategy.expert_tensor_parallel == 1,
        "has no tensor parallelism of experts",
        lambda plan: {
            "expert_tensor_parallel": 1,
            "expert_data_parallel": plan.strategy.ranks_per_stage // plan.strategy.expert_parallel,
        },
    ),
    Limit(
        "strategy.tensor_parallel",
        lambda plan: plan.strategy.tensor_parallel == 1 or plan.strategy.expert_parallel > 1,
        "has tensor parallelism only together with expert_parallel > 1",
        lambda plan: {
            "tensor_parallel": 1,
            "data_parallel": plan.strategy.data_parallel * plan.strategy.tensor_parallel,
        },
    ),
    Limit(
        "strategy.recompute",
        lambda plan: plan.strategy.recompute != "selective",
        "recomputes whole layers of Hugging Face models",
        lambda plan: {"recompute": "full", "recompute_modules": ()},
    ),
    Limit(
        "strategy.zero_expert",
        lambda plan: len(plan.strategy.sharding_levels) < 2,
        "shards dense and expert parameters alike",
        _one_level,
    ),
)

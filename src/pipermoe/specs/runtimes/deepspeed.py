"""What DeepSpeed with AutoEP runs. Source: DeepSpeed 0.19.8; the export's tests hold it against the real one."""

from __future__ import annotations

from pipermoe.specs.catalogue import is_catalogue_entry
from pipermoe.specs.legality import Changes, Job
from pipermoe.specs.runtimes.limits import (
    alike,
    dropless_training,
    job_limit,
    limit,
    recomputed_whole,
    scheduled,
    sharding,
)
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import RECOMPUTE_NAMES

VERSION = "0.19.8"
TARGET = f"DeepSpeed {VERSION}"

# AutoEP's preset of the catalogue's models.
PRESETS = {
    "deepseek-v2": "deepseek_v2",
    "deepseek-v2-lite": "deepseek_v2",
    "deepseek-v3": "deepseek_v3",
    "mixtral-8x22b": "mixtral",
    "mixtral-8x7b": "mixtral",
    "qwen1.5-moe-a2.7b": "qwen3_moe",
    "qwen2-57b-a14b": "qwen3_moe",
    "qwen3-235b-a22b": "qwen3_moe",
    "qwen3-30b-a3b": "qwen3_moe",
    "qwen3-coder-480b-a35b": "qwen3_moe",
}
PRECISIONS = {"fp32": "", "bf16": "bf16", "fp16": "fp16"}  # the section that switches it on


def _as_data_parallel(strategy: Strategy, job: Job) -> Changes:
    """The ranks of pipeline and sequence as further data-parallel ranks; experts stay on as many ranks as they are."""
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


RULES = (
    job_limit(
        "model.name",
        lambda job: job.model.name in PRESETS and is_catalogue_entry(job.model),
        f"AutoEP has presets of {', '.join(PRESETS)} of the catalogue, as they are there",
    ),
    *dropless_training(PRECISIONS, state="is exported with the usual state only"),
    limit(
        "pipeline_parallel",
        lambda table, job: table.pipeline_parallel == 1,
        "has no pipeline of Hugging Face models",
        _as_data_parallel,
    ),
    limit(
        "context_parallel",
        lambda table, job: table.context_parallel == 1,
        "splits sequences over heads (Ulysses), not over context_parallel ranks",
        _as_data_parallel,
    ),
    limit(
        "schedule",
        lambda table, job: scheduled(table, ["1f1b"]) & (table.virtual_stages == 1),
        "accumulates gradients one micro-batch after the other",
        _as_data_parallel,
    ),
    limit(
        "expert_tensor_parallel",
        lambda table, job: table.expert_tensor_parallel == 1,
        "has no tensor parallelism of experts",
        lambda strategy, job: {
            "expert_tensor_parallel": 1,
            "expert_data_parallel": strategy.ranks_per_stage // strategy.expert_parallel,
        },
    ),
    limit(
        "tensor_parallel",
        lambda table, job: (table.tensor_parallel == 1) | (table.expert_parallel > 1),
        "has tensor parallelism only together with expert_parallel > 1",
        lambda strategy, job: {
            "tensor_parallel": 1,
            "data_parallel": strategy.data_parallel * strategy.tensor_parallel,
        },
    ),
    limit(
        "recompute",
        lambda table, job: table.recompute != RECOMPUTE_NAMES.index("selective"),
        "recomputes whole layers of Hugging Face models",
        recomputed_whole,
    ),
    limit(
        "zero_expert",
        lambda table, job: sharding(table)[0],
        "shards dense and expert parameters alike",
        alike,
    ),
)

"""What torchtitan runs. Source: torchtitan 0.3.0; the export's tests hold it against the real one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipermoe.specs.catalogue import is_catalogue_entry
from pipermoe.specs.legality import Job
from pipermoe.specs.runtimes.limits import (
    Mask,
    dropless_training,
    job_limit,
    limit,
    pipeline_outermost,
    recomputed_whole,
    scheduled,
    sharding,
    stages_apart,
)
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import DISPATCHER_NAMES, RECOMPUTE_NAMES, StrategyTable

VERSION = "0.3.0"
TARGET = f"torchtitan {VERSION}"


@dataclass(frozen=True, slots=True)
class Registered:
    """Where torchtitan registers a model: torchtitan.models.`family`.config_registry.`function`."""

    family: str
    function: str


MODELS: dict[str, Registered] = {
    "deepseek-v3": Registered("deepseek_v3", "deepseek_v3_671b"),
    "gpt-oss-20b": Registered("gpt_oss", "gpt_oss_20b"),
    "gpt-oss-120b": Registered("gpt_oss", "gpt_oss_120b"),
    "qwen3-30b-a3b": Registered("qwen3", "qwen3_30b_a3b"),
}
NUMBERS = {"fp32": "float32", "bf16": "bfloat16"}


def _is_registered(job: Job) -> bool:
    return job.model.name in MODELS and is_catalogue_entry(job.model)


def _expert_tensor_parallel(strategy: Strategy) -> int:
    """Experts have ranks of their own, or are split as attention is."""
    return 1 if strategy.expert_parallel > 1 else strategy.tensor_parallel


def _split_as_attention(table: StrategyTable, job: Job) -> Mask:
    return table.expert_tensor_parallel == np.where(table.expert_parallel > 1, 1, table.tensor_parallel)


def _level(strategy: Strategy) -> int:
    """The nearest level of FSDP2, which always shards gradients."""
    return max(2, *strategy.sharding_levels)


def _sharded_by_fsdp(table: StrategyTable, job: Job) -> Mask:
    alike, nothing, level = sharding(table)
    replicates = (table.expert_parallel == 1) & (table.context_parallel == 1)
    return nothing | (alike & ((level >= 2) | ((level == 0) & replicates)))


RULES = (
    job_limit(
        "model.name",
        _is_registered,
        f"registers {', '.join(MODELS)} of the catalogue, as they are there",
    ),
    *dropless_training(NUMBERS, state="keeps weights, gradients and moments in fp32"),
    limit(
        "recompute",
        lambda table, job: table.recompute != RECOMPUTE_NAMES.index("selective"),
        "chooses what to recompute by operation, not by module",
        recomputed_whole,
    ),
    limit(
        "schedule",
        lambda table, job: ~scheduled(table, ["dualpipe"]),
        "holds one copy of every stage",
        lambda strategy, job: {"schedule": "dualpipe-v", "virtual_stages": 2},
    ),
    limit(
        "schedule",
        lambda table, job: (table.pipeline_parallel > 1) | scheduled(table, ["1f1b"]),
        "accumulates gradients one micro-batch after the other without a pipeline",
        lambda strategy, job: {"schedule": "1f1b", "virtual_stages": 1},
    ),
    limit(
        "rank_order",
        lambda table, job: stages_apart(table),
        "numbers ranks with the pipeline outermost",
        pipeline_outermost,
    ),
    limit(
        "expert_tensor_parallel",
        _split_as_attention,
        "has no tensor parallelism of experts beside expert_parallel, and that of attention without",
        lambda strategy, job: {
            "expert_tensor_parallel": _expert_tensor_parallel(strategy),
            "expert_data_parallel": strategy.ranks_per_stage
            // (strategy.expert_parallel * _expert_tensor_parallel(strategy)),
        },
    ),
    limit(
        "zero_dense",
        _sharded_by_fsdp,
        "shards with FSDP2: ZeRO-2 or 3 of dense and expert parameters alike, or 0 without expert_parallel "
        "and context_parallel",
        lambda strategy, job: {
            "zero_dense": _level(strategy) if strategy.data_parallel * strategy.context_parallel > 1 else 0,
            "zero_expert": _level(strategy) if strategy.expert_data_parallel > 1 else 0,
        },
    ),
    limit(
        "dispatcher",
        lambda table, job: table.dispatcher == DISPATCHER_NAMES.index("all_to_all"),
        "chooses another dispatcher where a model is registered",
        lambda strategy, job: {"dispatcher": "all_to_all"},
    ),
)

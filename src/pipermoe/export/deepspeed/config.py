"""A plan as a DeepSpeed job: deepspeed.json, and a script that starts the user's training program with it."""

from __future__ import annotations

import json
from typing import Any

from pipermoe import __version__
from pipermoe.export.deepspeed.names import OURS
from pipermoe.export.shell import Cluster, launch_script, title
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.runtimes.deepspeed import PRECISIONS, PRESETS, TARGET

BACKENDS = {"all_to_all": "comm", "deduplicated": "deepep"}


def files(plan: Configuration, cluster: Cluster) -> dict[str, str]:
    """The files of the job by name."""
    what = title(plan)
    return {
        "deepspeed.json": json.dumps(configuration(plan), indent=2) + "\n",
        "launch.sh": launch_script(
            what,
            TARGET,
            cluster,
            '"$TRAIN" --deepspeed --deepspeed_config deepspeed.json',
            environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
            needs=[("TRAIN", "set it to your program, which calls deepspeed.initialize on a Hugging Face model")],
        ),
    }


def configuration(plan: Configuration) -> dict[str, Any]:
    """The whole of deepspeed.json. The section "pipermoe" is ours: what else the program needs to know."""
    train, strategy, optimizer = plan.train, plan.strategy, plan.train.optimizer
    level = max(strategy.sharding_levels, default=0)
    given: dict[str, Any] = {
        OURS: {
            "written_by": f"pipermoe {__version__}",
            "tested_with": TARGET,
            "model": plan.model.name,
            "seq_len": train.seq_len,
            "steps": train.steps,
            "gradient_checkpointing": strategy.recompute == "full",
        },
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": strategy.micro_batch_size,
        "gradient_accumulation_steps": plan.microbatches,
        "gradient_clipping": optimizer.gradient_clip,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": level}
        | ({"overlap_comm": True, "contiguous_gradients": True, "reduce_scatter": True} if level else {}),
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": [optimizer.beta1, optimizer.beta2],
                "eps": optimizer.epsilon,
                "weight_decay": optimizer.weight_decay,
            },
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": train.steps,
                "warmup_num_steps": optimizer.warmup_steps,
                "warmup_type": "linear",
                "cos_min_ratio": optimizer.minimum_learning_rate / optimizer.learning_rate,
            },
        },
        "expert_parallel": _expert_parallel(plan),
    }
    if section := PRECISIONS[train.precision]:
        given[section] = {"enabled": True}
    if strategy.tensor_parallel > 1:
        given["tensor_parallel"] = {"autotp_size": strategy.tensor_parallel}
    return given


def _expert_parallel(plan: Configuration) -> dict[str, Any]:
    strategy = plan.strategy
    section = {
        "enabled": True,
        "autoep_size": strategy.expert_parallel,
        "expert_tensor_parallel_size": 1,
        "preset_model": PRESETS[plan.model.name],
        "comm_backend": BACKENDS[strategy.dispatcher],
    }
    if strategy.dispatcher == "deduplicated":
        section["comm_max_tokens_per_rank"] = strategy.micro_batch_size * plan.train.seq_len
    return section

"""A plan as a torchtitan job: a module with a function that returns its Trainer.Config, and a launch script."""

from __future__ import annotations

from collections.abc import Iterator

from pipermoe.export.shell import Cluster, header, launch_script, title
from pipermoe.export.torchtitan.names import RESHARD, SCHEDULES
from pipermoe.schedule.action import Schedule
from pipermoe.schedule.builders import schedule_of
from pipermoe.schedule.torch_csv import to_csv
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.mesh import split_layers
from pipermoe.specs.runtimes.torchtitan import MODELS, NUMBERS, TARGET, Registered


def files(plan: Configuration, cluster: Cluster) -> dict[str, str]:
    """The files of the job by name."""
    schedule = _schedule_file(plan)
    return {
        "pipermoe_plan.py": module_text(plan, MODELS[plan.model.name]),
        **({schedule: to_csv(_schedule(plan))} if schedule else {}),
        "launch.sh": launch_script(
            title(plan),
            TARGET,
            cluster,
            "-m torchtitan.train --module pipermoe_plan --config plan",
            environment={
                "PYTHONPATH": '"$PWD${PYTHONPATH:+:$PYTHONPATH}"',
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            },
        ),
    }


def module_text(plan: Configuration, registered: Registered) -> str:
    """The module: `plan()` is the registered model's configuration with everything that the plan decides."""
    strategy, train, optimizer = plan.strategy, plan.train, plan.train.optimizer
    in_pipeline = strategy.pipeline_parallel > 1
    batch = train.global_batch_size // strategy.data_parallel if in_pipeline else strategy.micro_batch_size
    assignments = {
        "training.seq_len": train.seq_len,
        "training.global_batch_size": train.global_batch_size,
        "training.local_batch_size": batch,
        "training.steps": train.steps,
        "training.max_norm": optimizer.gradient_clip,
        "training.mixed_precision_param": NUMBERS[train.precision],
        "training.disable_cuda_graphs": True,  # graphs forbid pipelines and plain all-to-alls
        "lr_scheduler.warmup_steps": optimizer.warmup_steps,
        "lr_scheduler.decay_type": "cosine",
        "lr_scheduler.min_lr_factor": optimizer.minimum_learning_rate / optimizer.learning_rate,
    }
    degrees = "".join(f"        {key}={value!r},\n" for key, value in _parallelism(plan).items())
    settings = "".join(f"    config.{key} = {value!r}\n" for key, value in assignments.items())
    recompute = "FullAC.Config()" if strategy.recompute == "full" else "None"
    registry = f"torchtitan.models.{registered.family}.config_registry"
    return (
        header(title(plan), TARGET)
        + "\n"
        + "from torchtitan.components.optimizer import default_adamw\n"
        + "from torchtitan.config import ParallelismConfig\n"
        + ("from torchtitan.distributed.activation_checkpoint import FullAC\n" * (strategy.recompute == "full"))
        + f"from {registry} import {registered.function}\n"
        + "from torchtitan.trainer import Trainer\n\n\n"
        + "def plan() -> Trainer.Config:\n"
        + f"    config = {registered.function}()\n"
        + f"    config.parallelism = ParallelismConfig(\n{degrees}    )\n"
        + settings
        + f"    config.optimizer = default_adamw(lr={optimizer.learning_rate!r}, "
        + f"betas=({optimizer.beta1!r}, {optimizer.beta2!r}), eps={optimizer.epsilon!r}, "
        + f"weight_decay={optimizer.weight_decay!r})\n"
        + f"    config.activation_checkpoint = {recompute}\n"
        + "    return config\n"
    )


def _parallelism(plan: Configuration) -> dict[str, object]:
    strategy = plan.strategy
    level = max(strategy.sharding_levels, default=2)
    degrees: dict[str, object] = {
        "data_parallel_replicate_degree": 1 if level else strategy.data_parallel,
        "data_parallel_shard_degree": strategy.data_parallel if level else 1,
        "fsdp_reshard_after_forward": RESHARD.get(level, "never"),
        "tensor_parallel_degree": strategy.tensor_parallel,
        "context_parallel_degree": strategy.context_parallel,
        "expert_parallel_degree": strategy.expert_parallel,
        "pipeline_parallel_degree": strategy.pipeline_parallel,
    }
    if strategy.pipeline_parallel > 1:
        degrees |= {
            "pipeline_parallel_microbatch_size": strategy.micro_batch_size,
            "pipeline_parallel_schedule": _placement(plan) if _schedule_file(plan) else SCHEDULES[strategy.schedule],
            "module_fqns_per_model_part": list(_modules(plan)),
        }
        if schedule := _schedule_file(plan):
            degrees["pipeline_parallel_schedule_csv"] = schedule
    return degrees


def _modules(plan: Configuration) -> Iterator[list[str]]:
    """The modules of every stage, in the order of the model."""
    strategy = plan.strategy
    stages = split_layers(plan.model.num_layers, strategy.num_stages, strategy.layer_split)
    for stage, layers in enumerate(stages):
        first, last = stage == 0, stage == len(stages) - 1
        yield [
            *(["tok_embeddings"] if first else []),
            *(f"layers.{layer}" for layer in layers),
            *(["norm", "lm_head"] if last else []),
        ]


def _schedule_file(plan: Configuration) -> str:
    """The CSV of the schedule where torch has none in the same order; empty if it has."""
    strategy = plan.strategy
    if strategy.pipeline_parallel == 1:
        return ""
    rounds = max(1, plan.microbatches // strategy.pipeline_parallel)
    uneven = strategy.schedule == "interleaved-1f1b" and plan.microbatches % rounds
    return f"{strategy.schedule}.csv" if uneven or strategy.schedule not in SCHEDULES else ""


def _schedule(plan: Configuration) -> Schedule:
    return schedule_of(plan.strategy, plan.train.global_batch_size)


def _placement(plan: Configuration) -> str:
    """The schedule of torch that lays stages out as this one does; its order is then replaced by the CSV."""
    strategy = plan.strategy
    loop = [stage % strategy.pipeline_parallel for stage in range(strategy.num_stages)]
    if list(_schedule(plan).stage_rank) != loop:
        return "ZBVZeroBubble"
    return "Interleaved1F1B" if strategy.virtual_stages > 1 else "1F1B"

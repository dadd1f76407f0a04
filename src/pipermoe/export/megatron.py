"""A plan as a job of Megatron-LM's pretrain_gpt.py: an argument file and a launch script.

The arguments themselves are `specs.megatron`; here is what Megatron cannot express, and the files.
"""

from __future__ import annotations

from pipermoe.export.limits import Changes, Limit, microbatches
from pipermoe.export.shell import Cluster, header, launch_script
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.megatron import VERSION, Arguments, unsupported_parts, write_arguments
from pipermoe.specs.megatron.options import Value
from pipermoe.specs.megatron.strategy import RECOMPUTE
from pipermoe.specs.megatron.train import unsupported_state
from pipermoe.specs.strategy_text import strategy_text

TARGET = f"Megatron-LM {VERSION}"
SCHEDULES = ("1f1b", "1f1b-overlap", "interleaved-1f1b", "interleaved-1f1b-overlap")

# Fused kernels and a regular garbage collector: faster, and nothing else.
FASTER: dict[str, Value] = {"moe_permute_fusion": True, "cross_entropy_loss_fusion": True, "manual_gc": True}

# Of the model recipes of Megatron-LM's users (github.com/yanring/Megatron-MoE-ModelZoo).
ENVIRONMENT = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NCCL_NVLS_ENABLE": "0",
}


def files(plan: Configuration, cluster: Cluster) -> dict[str, str]:
    """The files of the job by name."""
    what = f"{plan.model.name} on {plan.strategy.world_size} ranks: {strategy_text(plan.strategy)}"
    given = write_arguments(plan.model, plan.train, plan.strategy).given
    arguments = "".join(" ".join(words) + "\n" for words in Arguments({**given, **FASTER}).words())
    read_arguments = (
        "arguments=()\n"
        "while read -r -a words; do arguments+=(\"${words[@]}\"); done < <(grep -v '^#' megatron.args)\n"
        "# DATA: arguments for data and tokenizer; synthetic tokens without it.\n"
        'read -r -a data <<< "${DATA:---mock-data --tokenizer-type NullTokenizer'
        f' --vocab-size {plan.model.vocab_size - 1}}}"\n'
    )
    return {
        "megatron.args": header(what, TARGET) + arguments,
        "launch.sh": launch_script(
            what,
            TARGET,
            cluster,
            '"$MEGATRON/pretrain_gpt.py" "${arguments[@]}" "${data[@]}"',
            environment=environment(plan),
            needs=[("MEGATRON", "set it to the folder of Megatron-LM that holds pretrain_gpt.py")],
            before=read_arguments,
        ),
    }


def environment(plan: Configuration) -> dict[str, str]:
    """Variables of the run. Launching one kernel at a time orders communication before computing, except under FSDP."""
    if max(plan.strategy.sharding_levels, default=0) > 1:
        return ENVIRONMENT
    return {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} | ENVIRONMENT


def _overlaps(plan: Configuration) -> bool:
    return plan.strategy.schedule.endswith("-overlap")


def _schedule(plan: Configuration) -> Changes:
    """The nearest order of Megatron: with as many chunks, and overlapped if this one was."""
    looped = plan.strategy.virtual_stages > 1
    overlaps = "overlap" in plan.strategy.schedule or plan.strategy.schedule.startswith("dualpipe")
    name = "interleaved-1f1b" if looped else "1f1b"
    can_overlap = looped or plan.strategy.pipeline_parallel == 1
    return {"schedule": f"{name}-overlap" if overlaps and can_overlap else name}


def _without_overlap(plan: Configuration) -> Changes:
    return {"schedule": plan.strategy.schedule.removesuffix("-overlap")}


def _whole_rounds(plan: Configuration) -> Changes:
    """A smaller micro-batch that fills whole rounds of the pipeline, else one chunk per rank."""
    per_rank = plan.train.global_batch_size // plan.strategy.data_parallel
    for size in range(plan.strategy.micro_batch_size, 0, -1):
        if per_rank % size == 0 and per_rank // size % plan.strategy.pipeline_parallel == 0:
            return {"micro_batch_size": size}
    return {"virtual_stages": 1, "schedule": "1f1b"}


LIMITS: tuple[Limit, ...] = (
    Limit(
        "strategy.schedule",
        lambda plan: plan.strategy.schedule in SCHEDULES,
        f"runs {', '.join(SCHEDULES)} only",
        _schedule,
    ),
    Limit(
        "strategy.schedule",
        lambda plan: not (plan.strategy.schedule == "1f1b-overlap" and plan.strategy.pipeline_parallel > 1),
        "overlaps all-to-alls across a pipeline only with several chunks per rank",
        lambda plan: (
            {"virtual_stages": 2, "schedule": "interleaved-1f1b-overlap"}
            if plan.model.num_layers >= 2 * plan.strategy.pipeline_parallel
            else {"schedule": "1f1b"}
        ),
    ),
    Limit(
        "strategy.virtual_stages",
        lambda plan: plan.strategy.virtual_stages == 1 or plan.strategy.pipeline_parallel > 1,
        "has several chunks per rank only in a pipeline",
        lambda plan: {"virtual_stages": 1, "schedule": plan.strategy.schedule.removeprefix("interleaved-")},
    ),
    Limit(
        "strategy.micro_batch_size",
        lambda plan: plan.strategy.virtual_stages == 1 or microbatches(plan) % plan.strategy.pipeline_parallel == 0,
        "interleaves in rounds of pipeline_parallel micro-batches, which must divide their number",
        _whole_rounds,
    ),
    Limit(
        "strategy.schedule",
        lambda plan: not _overlaps(plan) or plan.strategy.expert_parallel > 1,
        "overlaps all-to-alls only with expert_parallel > 1",
        _without_overlap,
    ),
    Limit(
        "strategy.schedule",
        lambda plan: not _overlaps(plan) or plan.strategy.recompute != "full",
        "does not overlap all-to-alls under full recomputation",
        _without_overlap,
    ),
    Limit(
        "strategy.schedule",
        lambda plan: not _overlaps(plan) or plan.train.precision != "fp32",
        "overlaps all-to-alls in 16 bits only",
        _without_overlap,
    ),
    Limit(
        "strategy.recompute_modules",
        lambda plan: set(plan.strategy.recompute_modules) <= set(RECOMPUTE),
        f"recomputes {', '.join(RECOMPUTE)} or everything",
        lambda plan: {"recompute": "full", "recompute_modules": ()},
    ),
    Limit(
        "strategy.zero_expert",
        lambda plan: len(plan.strategy.sharding_levels) < 2,
        "shards dense and expert parameters alike",
        lambda plan: dict.fromkeys(("zero_dense", "zero_expert"), max(plan.strategy.sharding_levels)),
    ),
    Limit(
        "train.seq_len",
        lambda plan: (
            plan.strategy.context_parallel == 1 or plan.train.seq_len % (2 * plan.strategy.context_parallel) == 0
        ),
        "splits a sequence over context_parallel ranks into twice as many parts",
        lambda plan: {
            "context_parallel": 1,
            "data_parallel": plan.strategy.data_parallel * plan.strategy.context_parallel,
        },
    ),
)


def limits(plan: Configuration) -> list[Limit]:
    """What Megatron cannot express, the model's own parts first."""
    parts = [Limit(f"model.{key}", lambda _: False, rule) for key, _, rule in unsupported_parts(plan.model)]
    if rule := unsupported_state(plan.train):
        parts.append(Limit("train.state_bytes", lambda _: False, rule))
    return [*parts, *LIMITS]

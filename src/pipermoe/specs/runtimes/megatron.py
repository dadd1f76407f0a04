"""What Megatron-LM's pretrain_gpt.py runs; specs/megatron is its language. The export's tests hold it against it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipermoe.specs.legality import Changes, Job, divides
from pipermoe.specs.megatron import VERSION, unsupported_parts
from pipermoe.specs.megatron.strategy import RECOMPUTE
from pipermoe.specs.megatron.train import unsupported_state
from pipermoe.specs.runtimes.limits import (
    Mask,
    alike,
    limit,
    parts_limit,
    pipeline_outermost,
    recomputed_whole,
    scheduled,
    sharding,
    stages_apart,
)
from pipermoe.specs.strategy import RECOMPUTE_MODULES, Strategy
from pipermoe.specs.strategy_table import RECOMPUTE_NAMES, StrategyTable

TARGET = f"Megatron-LM {VERSION}"
SCHEDULES = ("1f1b", "1f1b-overlap", "interleaved-1f1b", "interleaved-1f1b-overlap")
OVERLAPPED = tuple(name for name in SCHEDULES if name.endswith("-overlap"))


def _unsupported(job: Job) -> Iterator[tuple[str, object, str]]:
    for key, value, rule in unsupported_parts(job.model):
        yield f"model.{key}", value, rule
    if rule := unsupported_state(job.train):
        yield "train.state_bytes", job.train.state_bytes, rule


def _schedule(strategy: Strategy, job: Job) -> Changes:
    """The nearest order of Megatron: with as many chunks, and overlapped if this one was."""
    looped = strategy.virtual_stages > 1
    overlaps = "overlap" in strategy.schedule or strategy.schedule.startswith("dualpipe")
    name = "interleaved-1f1b" if looped else "1f1b"
    can_overlap = looped or strategy.pipeline_parallel == 1
    return {"schedule": f"{name}-overlap" if overlaps and can_overlap else name}


def _several_chunks(strategy: Strategy, job: Job) -> Changes:
    if job.model.num_layers >= 2 * strategy.pipeline_parallel:
        return {"virtual_stages": 2, "schedule": "interleaved-1f1b-overlap"}
    return {"schedule": "1f1b"}


def _without_overlap(strategy: Strategy, job: Job) -> Changes:
    return {"schedule": strategy.schedule.removesuffix("-overlap")}


def _in_rounds(table: StrategyTable, job: Job) -> Mask:
    rounds = table.microbatches(job.train.global_batch_size) % table.pipeline_parallel == 0
    return (table.virtual_stages == 1) | rounds


def _whole_rounds(strategy: Strategy, job: Job) -> Changes:
    """A smaller micro-batch that fills whole rounds of the pipeline, else one chunk per rank."""
    per_rank = job.train.global_batch_size // strategy.data_parallel
    for size in range(strategy.micro_batch_size, 0, -1):
        if per_rank % size == 0 and per_rank // size % strategy.pipeline_parallel == 0:
            return {"micro_batch_size": size}
    return {"virtual_stages": 1, "schedule": "1f1b"}


def _rebuilds_known(table: StrategyTable, job: Job) -> Mask:
    unknown = [table.rebuilds(module) for module in RECOMPUTE_MODULES if module not in RECOMPUTE]
    return ~np.logical_or.reduce(unknown)


RULES = (
    parts_limit(_unsupported),
    limit("schedule", lambda table, job: scheduled(table, SCHEDULES), f"runs {', '.join(SCHEDULES)} only", _schedule),
    limit(
        "schedule",
        lambda table, job: ~scheduled(table, ["1f1b-overlap"]) | (table.pipeline_parallel == 1),
        "overlaps all-to-alls across a pipeline only with several chunks per rank",
        _several_chunks,
    ),
    limit(
        "virtual_stages",
        lambda table, job: (table.virtual_stages == 1) | (table.pipeline_parallel > 1),
        "has several chunks per rank only in a pipeline",
        lambda strategy, job: {"virtual_stages": 1, "schedule": strategy.schedule.removeprefix("interleaved-")},
    ),
    limit(
        "micro_batch_size",
        _in_rounds,
        "interleaves in rounds of pipeline_parallel micro-batches, which must divide their number",
        _whole_rounds,
    ),
    limit(
        "schedule",
        lambda table, job: ~scheduled(table, OVERLAPPED) | (table.expert_parallel > 1),
        "overlaps all-to-alls only with expert_parallel > 1",
        _without_overlap,
    ),
    limit(
        "schedule",
        lambda table, job: ~scheduled(table, OVERLAPPED) | (table.recompute != RECOMPUTE_NAMES.index("full")),
        "does not overlap all-to-alls under full recomputation",
        _without_overlap,
    ),
    limit(
        "schedule",
        lambda table, job: ~scheduled(table, OVERLAPPED) | (job.train.precision != "fp32"),
        "overlaps all-to-alls in 16 bits only",
        _without_overlap,
    ),
    limit(
        "recompute_modules",
        _rebuilds_known,
        f"recomputes {', '.join(RECOMPUTE)} or everything",
        recomputed_whole,
    ),
    limit("zero_expert", lambda table, job: sharding(table)[0], "shards dense and expert parameters alike", alike),
    limit(
        "rank_order",
        lambda table, job: stages_apart(table) | (table.data_parallel == table.expert_data_parallel),
        "puts the pipeline inside data parallelism only where data_parallel = expert_data_parallel",
        pipeline_outermost,
    ),
    limit(
        "train.seq_len",
        lambda table, job: (table.context_parallel == 1) | divides(2 * table.context_parallel, job.train.seq_len),
        "splits a sequence over context_parallel ranks into twice as many parts",
        lambda strategy, job: {
            "context_parallel": 1,
            "data_parallel": strategy.data_parallel * strategy.context_parallel,
        },
    ),
)

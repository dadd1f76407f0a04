"""A strategy as a row of the ranking."""

from __future__ import annotations

from pipermoe.planner.job import Job
from pipermoe.planner.result import Candidate
from pipermoe.resources.flops import training_forward_flops
from pipermoe.resources.memory import worst
from pipermoe.resources.step import outline, peak_flops_per_rank
from pipermoe.specs.mesh import pipeline_ranks
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.report import TERMS
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig


def candidate(job: Job, strategy: Strategy) -> Candidate:
    """What a strategy costs; its worst rank is the first of equals."""
    found = outline(job.model, job.platform, job.train, strategy, job.imbalance)
    place_of, tightest, seconds = pipeline_ranks(strategy), worst(found.memory_bytes), found.step_seconds
    peak = peak_flops_per_rank(job.platform, job.train, job.world_size) * job.world_size
    return Candidate(
        strategy=strategy,
        microbatches=strategy.microbatches(job.train.global_batch_size),
        step_seconds=seconds,
        tokens_per_second=job.train.tokens_per_step / seconds,
        model_flops_utilization=model_flops(job.model, job.train) / (seconds * peak),
        seconds={term: sum(found.seconds[place][term] for place in place_of) / len(place_of) for term in TERMS},
        worst_rank=place_of.index(tightest),
        peak_bytes=sum(found.memory_bytes[tightest].values()),
        memory_bytes=found.memory_bytes[tightest],
    )


def model_flops(model: ModelSpec, train: TrainConfig) -> float:
    """FLOPs of a step that training needs: forward and backward, causal attention, no recompute (for MFU)."""
    return 3 * float(training_forward_flops(model, tokens=train.tokens_per_step, seq_len=train.seq_len, causal=True))

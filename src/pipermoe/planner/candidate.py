"""A strategy as a row of the ranking."""

from __future__ import annotations

from pipermoe.planner.job import Job
from pipermoe.planner.result import Candidate
from pipermoe.resources.flops import training_forward_flops
from pipermoe.resources.step import peak_flops_per_rank
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.report import TERMS, RankReport, StepReport
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig


def candidate(job: Job, strategy: Strategy, prediction: StepReport) -> Candidate:
    """What a predicted strategy costs."""
    worst = worst_rank(prediction)
    seconds = prediction.step_seconds
    peak = peak_flops_per_rank(job.platform, job.train, job.world_size) * job.world_size
    return Candidate(
        strategy=strategy,
        microbatches=strategy.microbatches(job.train.global_batch_size),
        step_seconds=seconds,
        tokens_per_second=job.train.tokens_per_step / seconds,
        model_flops_utilization=model_flops(job.model, job.train) / (seconds * peak),
        seconds={term: prediction.mean_seconds(term) for term in TERMS},
        worst_rank=worst.rank,
        peak_bytes=worst.peak_bytes,
        memory_bytes=worst.memory_bytes,
    )


def worst_rank(prediction: StepReport) -> RankReport:
    """The rank with the largest peak, the first of equals."""
    return max(prediction.ranks, key=lambda rank: (rank.peak_bytes, -rank.rank))


def model_flops(model: ModelSpec, train: TrainConfig) -> float:
    """FLOPs of a step that training needs: forward and backward, causal attention, no recompute (for MFU)."""
    return 3 * float(training_forward_flops(model, tokens=train.tokens_per_step, seq_len=train.seq_len, causal=True))

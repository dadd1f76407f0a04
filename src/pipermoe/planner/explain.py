"""Why the winner wins: where its step goes, what bounds it, and why its neighbours lose."""

from __future__ import annotations

import math

import numpy as np

from pipermoe.planner.result import Alternative, Candidate
from pipermoe.planner.search import Field, Job
from pipermoe.planner.space import TAIL_COLUMNS
from pipermoe.resources.flops import model_forward_flops
from pipermoe.resources.step import compute_slots, peak_flops_per_rank, predict
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.report import MEMORY_CATEGORIES, TERMS, StepReport
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import RECOMPUTE_NAMES, SCHEDULE_NAMES
from pipermoe.specs.train import TrainConfig
from pipermoe.specs.units import format_seconds

AXES = (
    "pipeline_parallel",
    "expert_parallel",
    "micro_batch_size",
    "schedule",
    "recompute",
    "zero_dense",
    "zero_expert",
)


def candidate(job: Job, strategy: Strategy, prediction: StepReport) -> Candidate:
    """A strategy as a row of the ranking."""
    worst = max(prediction.ranks, key=lambda rank: (rank.peak_bytes, -rank.rank))
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


def model_flops(model: ModelSpec, train: TrainConfig) -> float:
    """FLOPs of a step that training needs: forward and backward, causal attention, no recompute (for MFU)."""
    return 3 * float(model_forward_flops(model, tokens=train.tokens_per_step, seq_len=train.seq_len, causal=True))


def alternatives(field: Field, chosen: Candidate) -> tuple[Alternative, ...]:
    """For every axis and every other value on it: the best strategy with that value, and why it loses.

    Of the micro-batch sizes only the next smaller and the next larger; a strategy that is best for several comes once.
    """
    axes_of: dict[int, list[str]] = {}
    for axis in AXES:
        column = getattr(field.space.tails if axis in TAIL_COLUMNS else field.space.heads, axis)
        here = _code(axis, chosen.strategy)
        values = np.unique(column[column != here]).tolist()
        if axis == "micro_batch_size":
            values = [v for v in values if v < here][-1:] + [v for v in values if v > here][:1]
        for value in values:
            place = _representative(field, axis, value)
            if place >= 0:
                axes_of.setdefault(place, []).append(axis)
    return tuple(_alternative(field, place, tuple(axes), chosen) for place, axes in axes_of.items())


def _code(axis: str, strategy: Strategy) -> int:
    value = getattr(strategy, axis)
    return (
        {"schedule": SCHEDULE_NAMES, "recompute": RECOMPUTE_NAMES}[axis].index(value)
        if isinstance(value, str)
        else value
    )


def _representative(field: Field, axis: str, value: int) -> int:
    """The fastest strategy with that value that fits, or if none does the smallest; -1 if there is none."""
    selection = field.space.select(**{axis: value})
    best = field.best(1, selection).best
    return best[0].place if best else field.smallest(selection)


def _alternative(field: Field, place: int, axes: tuple[str, ...], chosen: Candidate) -> Alternative:
    job, strategy = field.job, field.space.strategy(place)
    other = candidate(job, strategy, predict(job.model, job.platform, job.train, strategy, job.imbalance))
    if other.peak_bytes > job.memory_budget_bytes:
        more = {name: other.memory_bytes[name] - chosen.memory_bytes[name] for name in MEMORY_CATEGORIES}
        return Alternative(
            axes=axes,
            strategy=strategy,
            fits=False,
            rank=other.worst_rank,
            missing_bytes=other.peak_bytes - job.memory_budget_bytes,
            category=max(MEMORY_CATEGORIES, key=more.__getitem__),
        )
    slower = {term: other.seconds[term] - chosen.seconds[term] for term in TERMS}
    term = max(TERMS, key=slower.__getitem__)
    return Alternative(
        axes=axes,
        strategy=strategy,
        fits=True,
        rank=other.worst_rank,
        slower_seconds=other.step_seconds - chosen.step_seconds,
        term=term,
        term_seconds=slower[term],
    )


def bottleneck(field: Field, chosen: Candidate) -> str:
    """One or two sentences: the largest part of the step, and what the memory budget costs."""
    job, seconds = field.job, chosen.seconds
    parts = {
        "computing": seconds["forward"] + seconds["backward"],
        "the all-to-all": seconds["all_to_all"],
        "the pipeline bubble": seconds["pipeline_wait"],
        "reducing gradients": seconds["gradient_sync"],
        "the optimizer": seconds["optimizer"],
    }
    part = max(parts, key=parts.__getitem__)
    sentence = f"{part} takes {parts[part] / chosen.step_seconds:.0%} of the step"
    slots = compute_slots(job.platform, job.world_size)
    if part == "computing" and slots < job.world_size:
        sentence += f", because {job.world_size} ranks share {slots:.3g} core{'s' * (slots != 1)}"
    [unlimited] = field.best(memory_budget_bytes=math.inf).best
    if unlimited.seconds < chosen.step_seconds:
        gain = 1 - unlimited.seconds / chosen.step_seconds
        strategy = field.space.strategy(unlimited.place)
        sentence += (
            f"; with memory for {strategy.compact()} mbs{strategy.micro_batch_size} "
            f"it would take {format_seconds(unlimited.seconds)} ({gain:.1%} less)"
        )
    return sentence

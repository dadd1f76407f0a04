"""How the rules of runtimes are written: a column, when a row holds, why, and the nearest strategy that does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from pipermoe.specs.legality import Changes, Job, Rule
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import SCHEDULE_NAMES, StrategyTable

Mask = NDArray[np.bool_]


def limit(
    key: str,
    holds: Callable[[StrategyTable, Job], Mask],
    reason: str,
    change: Callable[[Strategy, Job], Changes] | None = None,
) -> Rule:
    """A rule about a field of the strategy, or of the job: `schedule`, `train.seq_len`, `model.name`."""

    def explain(strategy: Strategy, job: Job) -> tuple[str, object, str]:
        value = attrgetter(key)(job if "." in key else strategy)
        if isinstance(value, BaseModel):
            value = value.model_dump()
        return key, list(value) if isinstance(value, tuple) else value, reason

    return Rule(holds, explain, change)


def job_limit(key: str, holds: Callable[[Job], bool], reason: str) -> Rule:
    """A rule that no strategy meets where the model or the job does not."""
    return limit(key, lambda table, job: np.full(len(table), holds(job)), reason)


def dropless_training(precisions: Collection[str], *, state: str) -> tuple[Rule, ...]:
    """The rules of a runtime with these precisions, that drops no tokens; `state` says which bytes a parameter has."""
    return (
        job_limit(
            "train.precision", lambda job: job.train.precision in precisions, f"trains in {', '.join(precisions)}"
        ),
        job_limit("train.state_bytes", lambda job: job.train.state_bytes is None, state),
        job_limit("train.capacity_factor", lambda job: job.train.capacity_factor == 0, "drops no tokens"),
    )


def parts_limit(unsupported: Callable[[Job], Iterator[tuple[str, object, str]]]) -> Rule:
    """A rule that nothing is `unsupported`: (key, value, rule) of parts of the model or the job."""
    return Rule(
        holds=lambda table, job: np.full(len(table), next(unsupported(job), None) is None),
        explain=lambda strategy, job: next(unsupported(job)),
    )


def scheduled(table: StrategyTable, names: Collection[str]) -> Mask:
    """Which rows have one of the named schedules."""
    return np.isin(table.schedule, [SCHEDULE_NAMES.index(name) for name in names])


def stages_apart(table: StrategyTable) -> Mask:
    """Which rows have the pipeline outermost: by their order, or because they have no other."""
    return (table.pipeline_parallel == 1) | (table.runs_per_stage == 1)


def pipeline_outermost(strategy: Strategy, job: Job) -> Changes:
    """The other order of ranks."""
    return {"rank_order": "dp-pp"}


def sharding(table: StrategyTable) -> tuple[Mask, Mask, NDArray[np.int64]]:
    """Which rows shard dense and expert parameters alike, which have one replica of both; the higher level in effect.

    Over one replica no level shards anything: `Strategy.sharding_levels`.
    """
    dense, expert = table.dense_replicas > 1, table.expert_replicas > 1
    alike = ~(dense & expert) | (table.zero_dense == table.zero_expert)
    level = np.maximum(np.where(dense, table.zero_dense, 0), np.where(expert, table.zero_expert, 0))
    return alike, ~(dense | expert), level


def alike(strategy: Strategy, job: Job) -> Changes:
    """The higher of both ZeRO levels for dense and expert parameters."""
    return dict.fromkeys(("zero_dense", "zero_expert"), max(strategy.sharding_levels))


def recomputed_whole(strategy: Strategy, job: Job) -> Changes:
    """Full recomputation instead of that of some modules."""
    return {"recompute": "full", "recompute_modules": ()}

"""What makes a strategy legal. Each rule is written once: an array predicate, and the sentence for the user.

`LEGAL` are the rules of any training system; those of each are in specs/runtimes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.errors import describe_value, nearest_divisors
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import COLUMNS, SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Job:
    """What a strategy is judged against."""

    model: ModelSpec
    train: TrainConfig
    world_size: int


Changes = dict[str, object]  # fields of Strategy and their new values


@dataclass(frozen=True, slots=True)
class Rule:
    """`holds(table, job)` is a mask over rows; `explain(strategy, job)` gives (key, value, rule and way out).

    `change(strategy, job)`, where there is one, leads to the nearest strategy that obeys the rule.
    """

    holds: Callable[[StrategyTable, Job], NDArray[np.bool_]]
    explain: Callable[[Strategy, Job], tuple[str, object, str]]
    change: Callable[[Strategy, Job], Changes] | None = None

    def accepts(self, strategy: Strategy, job: Job) -> bool:
        """Whether one strategy obeys the rule."""
        return bool(self.holds(StrategyTable.of([strategy]), job)[0])

    def sentence(self, strategy: Strategy, job: Job) -> tuple[str, object, str]:
        """What `explain` says, its key as in a plan file: `strategy.schedule`, `train.precision`, `model.name`."""
        key, value, rule = self.explain(strategy, job)
        return key if key.startswith(("train.", "model.")) else f"strategy.{key}", value, rule


def divides(divisor, number) -> NDArray[np.bool_]:
    return np.asarray(number) % np.asarray(divisor) == 0


def _nearest(value: int, total: int) -> str:
    return ", ".join(map(str, nearest_divisors(value, total)))


def _must_divide(key: str, total: Callable[[Job], int], name: str) -> Rule:
    """The degree `key` must divide the size `total(job)`, which the user knows as `name`."""
    return Rule(
        holds=lambda table, job: divides(getattr(table, key), total(job)),
        explain=lambda strategy, job: (
            key,
            getattr(strategy, key),
            f"must divide {name} = {total(job)}; nearest: {_nearest(getattr(strategy, key), total(job))}",
        ),
    )


def _explain_world(strategy: Strategy, job: Job) -> tuple[str, object, str]:
    key = "pipeline_parallel * data_parallel * context_parallel * tensor_parallel"
    wanted = job.world_size // strategy.ranks_per_stage
    fits = wanted * strategy.ranks_per_stage == job.world_size
    way_out = f"; pipeline_parallel = {wanted} would" if fits else ""
    return key, strategy.world_size, f"must equal the number of ranks = {job.world_size}{way_out}"


def _explain_fold(strategy: Strategy, job: Job) -> tuple[str, object, str]:
    experts = strategy.expert_data_parallel * strategy.expert_parallel * strategy.expert_tensor_parallel
    return (
        "expert_data_parallel * expert_parallel * expert_tensor_parallel",
        experts,
        f"must equal data_parallel * context_parallel * tensor_parallel = {strategy.ranks_per_stage}",
    )


def _explain_stages(strategy: Strategy, job: Job) -> tuple[str, object, str]:
    layers = job.model.num_layers
    return (
        "pipeline_parallel * virtual_stages",
        strategy.num_stages,
        f"every stage needs a layer and the model has num_layers = {layers}; at most {layers}",
    )


def _splits_fit(table: StrategyTable, job: Job) -> NDArray[np.bool_]:
    lengths = np.array([len(split) for split in table.splits])[table.layer_split]
    sums = np.array([sum(split) for split in table.splits])[table.layer_split]
    return (lengths == 0) | ((lengths == table.num_stages) & (sums == job.model.num_layers))


def _explain_split(strategy: Strategy, job: Job) -> tuple[str, object, str]:
    return (
        "layer_split",
        list(strategy.layer_split),
        f"must give {strategy.num_stages} stages with {job.model.num_layers} layers in all; "
        "leave it out for an even split",
    )


def _explain_batch(strategy: Strategy, job: Job) -> tuple[str, object, str]:
    batch, dp = job.train.global_batch_size, strategy.data_parallel
    if batch % dp:
        way_out = f"nearest data_parallel: {_nearest(dp, batch)}"
    else:
        way_out = f"nearest micro_batch_size: {_nearest(strategy.micro_batch_size, batch // dp)}"
    return (
        "data_parallel * micro_batch_size",
        dp * strategy.micro_batch_size,
        f"must divide global_batch_size = {batch}; {way_out}",
    )


def _explain_microbatches(strategy: Strategy, job: Job) -> tuple[str, object, str]:
    per_rank = job.train.global_batch_size // strategy.data_parallel
    return (
        "micro_batch_size",
        strategy.micro_batch_size,
        f"gives {per_rank // strategy.micro_batch_size} micro-batches, and 1f1b needs at least pipeline_parallel = "
        f"{strategy.pipeline_parallel}; use gpipe, a smaller micro-batch or a larger global batch",
    )


def _enough_microbatches(table: StrategyTable, job: Job) -> NDArray[np.bool_]:
    is_1f1b = table.schedule == SCHEDULE_NAMES.index("1f1b")
    return ~is_1f1b | (table.microbatches(job.train.global_batch_size) >= table.pipeline_parallel)


def copies_fit(table: StrategyTable) -> NDArray[np.bool_]:
    """Where `ranks_per_copy` divides the ranks of an expert group into several blocks, or is 1."""
    block, ranks = table.ranks_per_copy, table.expert_parallel
    return (block == 1) | (divides(block, ranks) & (block < ranks))


def _explain_copies(strategy: Strategy, job: Job) -> tuple[str, object, str]:
    ranks = strategy.expert_parallel
    smaller = ", ".join(str(d) for d in range(2, ranks) if ranks % d == 0)
    rule = f"must divide expert_parallel = {ranks} into several blocks: {smaller or 'none do, leave it out'}"
    return "ranks_per_copy", strategy.ranks_per_copy, rule


def columns_read(rule: Rule, job: Job) -> frozenset[str]:
    """The columns of a table that a rule looks at; none: it is about the model or the job."""
    read = set()

    class Recording(StrategyTable):
        __slots__ = ()

        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

        def __len__(self) -> int:
            return 1

    row = StrategyTable.of([Strategy()])
    rule.holds(Recording(row.columns, row.splits), job)
    return frozenset(read).intersection(COLUMNS)


WORLD_RULE = Rule(lambda table, job: table.world_size == job.world_size, _explain_world)

LEGAL: tuple[Rule, ...] = (
    WORLD_RULE,
    Rule(lambda table, job: table.ranks_per_stage == table.expert_ranks_per_stage, _explain_fold),
    _must_divide("expert_parallel", lambda job: job.model.moe.num_experts, "num_experts"),
    _must_divide("tensor_parallel", lambda job: job.model.attention.num_kv_heads, "num_kv_heads"),
    _must_divide("tensor_parallel", lambda job: job.model.moe.shared_width, "shared_width"),
    _must_divide("tensor_parallel", lambda job: job.model.dense_width * bool(job.model.dense_layers), "dense_width"),
    _must_divide("context_parallel", lambda job: job.train.seq_len, "seq_len"),
    _must_divide("expert_tensor_parallel", lambda job: job.model.moe.expert_width, "expert_width"),
    Rule(lambda table, job: table.num_stages <= job.model.num_layers, _explain_stages),
    Rule(_splits_fit, _explain_split),
    Rule(
        lambda table, job: divides(table.data_parallel * table.micro_batch_size, job.train.global_batch_size),
        _explain_batch,
    ),
    Rule(_enough_microbatches, _explain_microbatches),
    Rule(lambda table, job: copies_fit(table), _explain_copies),
)


def legal_mask(
    table: StrategyTable, model: ModelSpec, train: TrainConfig, world_size: int, rules: tuple[Rule, ...] = LEGAL
) -> NDArray[np.bool_]:
    """Which rows obey every rule."""
    job = Job(model, train, world_size)
    legal = np.ones(len(table), dtype=bool)
    for rule in rules:
        legal &= rule.holds(table, job)
    return legal


def violations(
    strategy: Strategy, model: ModelSpec, train: TrainConfig, world_size: int, rules: tuple[Rule, ...] = LEGAL
) -> list[str]:
    """A line for every broken rule: `strategy.expert_parallel = 12: must divide num_experts = 128; nearest: 8, 16`."""
    job = Job(model, train, world_size)
    return [describe_value("", *rule.sentence(strategy, job)) for rule in rules if not rule.accepts(strategy, job)]

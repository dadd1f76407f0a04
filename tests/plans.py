"""Plans small enough to train in a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipermoe.specs.model import GroupedQueryAttention, MixtureOfExperts, ModelSpec
from pipermoe.specs.plan import Plan
from pipermoe.specs.report import MEMORY_CATEGORIES, TERMS, RankReport, StepReport
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

TINY_MODEL = ModelSpec(
    name="tiny",
    vocab_size=256,
    hidden_size=32,
    num_layers=2,
    attention=GroupedQueryAttention(num_heads=2, num_kv_heads=1, head_dim=16, qk_norm="head"),
    moe=MixtureOfExperts(num_experts=4, top_k=2, expert_width=16),
)


def plan_of(model: ModelSpec, train: TrainConfig, strategy: Strategy, ranks: Sequence[RankReport] = ()) -> Plan:
    """A plan that somebody might have made, of a step of one second."""
    return Plan(
        name="test",
        platform="none",
        memory_budget_bytes=2**36,
        model=model,
        train=train,
        strategy=strategy,
        prediction=StepReport(step_seconds=1.0, ranks=tuple(ranks)),
    )


def tiny_plan(strategy: Strategy, **train: Any) -> Plan:
    """A plan of two layers and four experts; `train` overrides a batch of 8 sequences of 32 bytes, 6 steps."""
    ranks = [
        RankReport(
            rank=rank,
            peak_bytes=1,
            memory_bytes=dict.fromkeys(MEMORY_CATEGORIES, 0),
            flops=1,
            traffic={},
            seconds=dict.fromkeys(TERMS, 0.0),
        )
        for rank in range(strategy.world_size)
    ]
    job = {"seq_len": 32, "global_batch_size": 8, "steps": 6, "validation_batches": 2, **train}
    return plan_of(TINY_MODEL, TrainConfig(**job), strategy, ranks)

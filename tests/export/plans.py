"""Plans to export: a small model of the Qwen3 family, any strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.plans import plan_of

from pipermoe.export import Job
from pipermoe.specs.errors import UserError
from pipermoe.specs.model import GroupedQueryAttention, MixtureOfExperts, ModelSpec
from pipermoe.specs.plan import Plan
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

MODEL = ModelSpec(
    name="small",
    vocab_size=1024,
    hidden_size=256,
    num_layers=8,
    attention=GroupedQueryAttention(num_heads=16, num_kv_heads=4, head_dim=16, qk_norm="head"),
    moe=MixtureOfExperts(num_experts=64, top_k=8, expert_width=64),
)


def plan_for(strategy: str | Strategy, model: ModelSpec | dict[str, Any] = MODEL, **train: Any) -> Plan:
    """A plan that runs `strategy`; a mapping of dotted keys for `model` changes the small one."""
    if isinstance(strategy, str):
        strategy = Strategy.parse(strategy)
    if isinstance(model, dict):
        model = _changed(model)
    job = {"seq_len": 1024, "global_batch_size": 64, "precision": "bf16", **train}
    return plan_of(model, TrainConfig(**job), strategy)


def _changed(changes: dict[str, Any]) -> ModelSpec:
    moe = {key.removeprefix("moe."): value for key, value in changes.items() if key.startswith("moe.")}
    rest = {key: value for key, value in changes.items() if "." not in key}
    return MODEL.model_copy(update={"moe": MODEL.moe.model_copy(update=moe), **rest})


def assert_refused_for(job_of: Callable[[str], tuple[Any, Job]], text: str, key: str, nearest: str) -> None:
    """`job_of(text)` is refused because of `key`, and the nearest strategy that it names is expressible."""
    with pytest.raises(UserError) as error:
        job_of(text)
    assert str(error.value).startswith(f"strategy.{key} = ")
    assert f"; nearest: '{nearest}', not priced" in str(error.value)
    assert job_of(nearest)[1].files

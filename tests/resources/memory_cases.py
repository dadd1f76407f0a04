"""Predicted and executed peaks of tiny models, for the tests of the memory model."""

from __future__ import annotations

from typing import NamedTuple

from pipermoe.dryrun.dry_run import dry_run
from pipermoe.resources.activations.sizes import RUNTIME, MemoryProfile
from pipermoe.resources.memory import rank_memory
from pipermoe.resources.states import state_elements
from pipermoe.resources.step import placement_of
from pipermoe.specs.model import GroupedQueryAttention, LatentAttention, MixtureOfExperts, ModelSpec, Router
from pipermoe.specs.precision import Precision
from pipermoe.specs.report import MemoryCategory
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig

SHARED = ModelSpec(
    name="grouped queries, shared experts",
    vocab_size=256,
    hidden_size=64,
    num_layers=4,
    attention=GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm="head"),
    moe=MixtureOfExperts(num_experts=8, top_k=2, expert_width=96, shared_width=64),
)
LATENT = ModelSpec(
    name="latent attention",
    vocab_size=256,
    hidden_size=64,
    num_layers=4,
    attention=LatentAttention(
        num_heads=4, q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16
    ),
    moe=MixtureOfExperts(num_experts=8, top_k=4, expert_width=48, shared_width=48, router=Router(score="sigmoid")),
)
# Values narrower than queries, as DeepSeek's: they are padded.
NARROW = LATENT.model_copy(
    update={"attention": LATENT.attention.model_copy(update={"qk_nope_head_dim": 16}), "name": "narrow values"}
)
DENSE_FIRST = ModelSpec(
    name="dense layers first",
    vocab_size=512,
    hidden_size=64,
    num_layers=4,
    attention=GroupedQueryAttention(num_heads=4, num_kv_heads=4, head_dim=16),
    moe=MixtureOfExperts(num_experts=8, top_k=2, expert_width=64),
    dense_layers=(0, 1),
    dense_width=192,
)
MODELS = {"shared": SHARED, "latent": LATENT, "narrow": NARROW, "dense-first": DENSE_FIRST}


class Case(NamedTuple):
    """A line of the matrix: a model of `MODELS`, the precision, and a strategy as text."""

    model: str
    precision: Precision
    strategy: str

    def train(self) -> TrainConfig:
        strategy = Strategy.parse(self.strategy)
        sequences = 6 * strategy.data_parallel * strategy.micro_batch_size
        return TrainConfig(seq_len=128, global_batch_size=sequences, precision=self.precision)


def predicted(case: Case, profile: MemoryProfile = RUNTIME) -> list[dict[MemoryCategory, int]]:
    """Bytes by category at the peak of every pipeline rank."""
    model, table = MODELS[case.model], StrategyTable.of([Strategy.parse(case.strategy)])
    states = state_elements(model, placement_of(model, table).ranks, table)
    return rank_memory(model, case.train(), table, states, profile)


def executed(case: Case) -> list[dict[MemoryCategory, int]]:
    """The same of the dry run, of the first rank of each stage."""
    strategy = Strategy.parse(case.strategy)
    ranks = range(0, strategy.world_size, strategy.ranks_per_stage)
    return [dry_run(MODELS[case.model], case.train(), strategy, rank=rank).report.memory_bytes for rank in ranks]


def error(case: Case, profile: MemoryProfile = RUNTIME) -> float:
    """Of the worst rank's predicted peak relative to the worst rank's executed one."""
    guess, truth = (max(sum(rank.values()) for rank in found) for found in (predicted(case, profile), executed(case)))
    return guess / truth - 1

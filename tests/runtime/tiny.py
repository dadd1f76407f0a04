"""A model and a job small enough to train in milliseconds, in variants that touch every part of the runtime."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pipermoe.modules.weight_gradients import gradient_of
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.schedule.action import Schedule
from pipermoe.schedule.builders import schedule_of
from pipermoe.schedule.communication import with_communication
from pipermoe.specs.model import (
    GroupedQueryAttention,
    LatentAttention,
    LocalAttention,
    MixtureOfExperts,
    ModelSpec,
    Router,
    Yarn,
)
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.train import AuxiliaryLossLevel, Optimizer, TrainConfig

PLAIN = ModelSpec(
    name="plain",
    vocab_size=37,
    hidden_size=16,
    num_layers=4,
    attention=GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=4),
    moe=MixtureOfExperts(num_experts=8, top_k=2, expert_width=12),
)
# A leading dense layer, a gated shared expert, every bias and a query-key norm.
RICH = PLAIN.model_copy(
    update={
        "name": "rich",
        "attention": GroupedQueryAttention(
            num_heads=4, num_kv_heads=2, head_dim=4, qkv_bias=True, output_bias=True, qk_norm="head"
        ),
        "moe": MixtureOfExperts(
            num_experts=8, top_k=2, expert_width=12, shared_width=8, shared_gate=True, router=Router(bias=True)
        ),
        "dense_layers": (0,),
        "dense_width": 24,
    }
)
SIGMOID = PLAIN.model_copy(
    update={
        "name": "sigmoid",
        "attention": GroupedQueryAttention(num_heads=4, num_kv_heads=4, head_dim=4, qk_norm="full", rotary_dim=2),
        "moe": MixtureOfExperts(
            num_experts=8,
            top_k=3,
            expert_width=12,
            shared_width=8,
            router=Router(score="sigmoid", normalize_top_k=True, scaling_factor=2.5),
        ),
    }
)
TIED = PLAIN.model_copy(update={"name": "tied", "tie_word_embeddings": True})
# DeepSeek-V3: latent attention through a query rank, YaRN, groups of experts chosen with a correction bias.
LATENT = PLAIN.model_copy(
    update={
        "name": "latent",
        "attention": LatentAttention(
            num_heads=3,
            q_lora_rank=6,
            kv_lora_rank=5,
            qk_nope_head_dim=4,
            qk_rope_head_dim=4,
            v_head_dim=5,
            bias=True,
            rope_theta=3.0,
            yarn=Yarn(factor=4.0, original_positions=8, beta_fast=1.2, beta_slow=0.5, mscale=0.7, mscale_all_dim=1.0),
        ),
        "moe": MixtureOfExperts(
            num_experts=8,
            top_k=2,
            expert_width=12,
            shared_width=8,
            router=Router(score="sigmoid", scaling_factor=2.5, correction_bias="buffer", num_groups=4, top_k_groups=2),
        ),
        "dense_layers": (0,),
        "dense_width": 24,
    }
)
# Two tokens more are predicted from a state that stages far apart have made.
PREDICTING = LATENT.model_copy(update={"name": "predicting", "mtp_layers": 2})
# DeepSeek-V2: direct queries, groups by their best expert, weights that do not add up to 1.
GROUPED = LATENT.model_copy(
    update={
        "name": "grouped",
        "attention": LATENT.attention.model_copy(update={"q_lora_rank": 0, "bias": False, "yarn": None}),
        "moe": LATENT.moe.model_copy(
            update={"router": Router(normalize_top_k=False, scaling_factor=16.0, num_groups=4, top_k_groups=3)}
        ),
    }
)
# gpt-oss: sinks, a window on every other layer, a bias on everything, clamped experts.
SINKS = PLAIN.model_copy(
    update={
        "name": "sinks",
        "attention": GroupedQueryAttention(
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
            qkv_bias=True,
            output_bias=True,
            sinks=True,
            rope_theta=3.0,
            yarn=Yarn(factor=8.0, original_positions=8, beta_fast=1.2, beta_slow=0.5, truncate=False),
        ),
        "moe": MixtureOfExperts(
            num_experts=8, top_k=2, expert_width=12, expert_bias=True, swiglu_limit=0.02, router=Router(bias=True)
        ),
        "local_attention": LocalAttention(kind="sliding", size=3, layers=(0, 2)),
    }
)
# What older families have: LayerNorm, plain blocks with biases; Llama 4's chunks, layers without positions, bare norm.
OLDER = PLAIN.model_copy(
    update={
        "name": "older",
        "attention": GroupedQueryAttention(num_heads=4, num_kv_heads=1, head_dim=4, qk_norm="l2"),
        "moe": MixtureOfExperts(
            num_experts=8,
            top_k=2,
            expert_width=12,
            shared_width=8,
            expert_matrices=2,
            expert_bias=True,
            router=Router(correction_bias="parameter"),
        ),
        "local_attention": LocalAttention(kind="chunked", size=3, layers=(1, 3)),
        "no_rope_layers": (0, 3),
        "dense_layers": (1,),
        "dense_width": 24,
        "dense_matrices": 2,
        "mlp_bias": True,
        "norm_bias": True,
        "head_bias": True,
    }
)
MODELS = {model.name: model for model in (PLAIN, RICH, SIGMOID, TIED, LATENT, PREDICTING, GROUPED, SINKS, OLDER)}

TRAIN = TrainConfig(
    seq_len=8,
    global_batch_size=8,
    auxiliary_loss=0.5,  # large, so that an error in its scale shows
    # The first Adam steps divide a gradient by its own size: with a small epsilon rounding noise in gradients near zero
    # becomes a step of full length.
    optimizer=Optimizer(learning_rate=1e-2, gradient_clip=0.5, epsilon=1e-4),
)
# With what balancing losses each model is trained; a load over the global batch depends on how it is divided.
LEVELS: dict[str, AuxiliaryLossLevel] = {
    "latent": "sequence",
    "predicting": "sequence",
    "sinks": "sequence",
    "older": "global_batch",
}


def job_of(name: str) -> TrainConfig:
    """How the model of this name is trained: the newer ones with z-loss, and biases that move by much."""
    if name in ("plain", "rich", "sigmoid", "tied"):
        return TRAIN
    level = LEVELS.get(name, "micro_batch")
    return TRAIN.model_copy(update={"auxiliary_loss_level": level, "z_loss": 0.3, "balance_rate": 0.02})


def engine_for(
    model: ModelSpec, strategy: Strategy, groups: ProcessGroups, train: TrainConfig = TRAIN, **options
) -> Engine:
    return Engine(model, train, strategy, lowered(strategy, train.global_batch_size), groups, **options)


def lowered(strategy: Strategy, sequences: int) -> Schedule:
    """The schedule with its sends and receives; who makes it before ranks are forked saves each of them the work."""
    return _lowered(strategy_text(strategy), sequences)


@cache
def _lowered(text: str, sequences: int) -> Schedule:
    return with_communication(schedule_of(Strategy.parse(text), sequences))


def reduced_gradients(engine: Engine) -> dict[str, Tensor]:
    """The gradients of a step by name when their sums over ranks, which it has begun, have ended; not sharded."""
    for flat in engine.flats:
        flat.reduce_gradients()
    return {name: gradient_of(parameter) for name, parameter in engine.named_parameters()}


def batch_for(strategy: Strategy, dp: int, step: int, model: ModelSpec = PLAIN, train: TrainConfig = TRAIN):
    """The tokens of one dp rank, the same global batch for every arrangement with this micro-batch size."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (-1, strategy.micro_batch_size, train.seq_len + 1)
    tokens = torch.randint(model.vocab_size, (train.global_batch_size, train.seq_len + 1), generator=generator)
    return tokens.view(shape).chunk(strategy.data_parallel)[dp]

"""A model and a job small enough to train in milliseconds, in variants that touch every part of the runtime."""

from __future__ import annotations

import torch

from pipermoe.runtime.engine import Engine
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.schedule.builders import build
from pipermoe.schedule.communication import with_communication
from pipermoe.specs.model import GroupedQueryAttention, MixtureOfExperts, ModelSpec, Router
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import Optimizer, TrainConfig

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
        "attention": GroupedQueryAttention(num_heads=4, num_kv_heads=4, head_dim=4, qk_norm="full"),
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
MODELS = {model.name: model for model in (PLAIN, RICH, SIGMOID, TIED)}

TRAIN = TrainConfig(
    seq_len=8,
    global_batch_size=8,
    auxiliary_loss=0.5,  # large, so that an error in its scale shows
    # The first Adam steps divide a gradient by its own size: with a small epsilon rounding noise in gradients near zero
    # becomes a step of full length.
    optimizer=Optimizer(learning_rate=1e-2, gradient_clip=0.5, epsilon=1e-4),
)


def microbatches(strategy: Strategy, train: TrainConfig = TRAIN) -> int:
    return train.global_batch_size // (strategy.data_parallel * strategy.micro_batch_size)


def engine_for(
    model: ModelSpec, strategy: Strategy, groups: ProcessGroups, train: TrainConfig = TRAIN, **options
) -> Engine:
    schedule = build(
        strategy.schedule, strategy.pipeline_parallel, microbatches(strategy, train), strategy.virtual_stages
    )
    return Engine(model, train, strategy, with_communication(schedule), groups, **options)


def batch_for(strategy: Strategy, dp: int, step: int, model: ModelSpec = PLAIN, train: TrainConfig = TRAIN):
    """The tokens of one dp rank, the same global batch for every arrangement with this micro-batch size."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (-1, strategy.micro_batch_size, train.seq_len + 1)
    tokens = torch.randint(model.vocab_size, (train.global_batch_size, train.seq_len + 1), generator=generator)
    return tokens.view(shape).chunk(strategy.data_parallel)[dp]

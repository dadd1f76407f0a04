"""For every arrangement and ZeRO level: the norm and the weights of one process with torch.optim.AdamW."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from tests.distributed.harness import run_ranks
from tests.distributed.odd_shapes import EXPERTS, SHAPES
from torch.nn import Parameter

from pipermoe.modules.names import is_expert
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.runtime.optimizer.sharding import Sharding, flatten, unit_of
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import Optimizer as OptimizerConfig

STEPS = 3
CONFIG = OptimizerConfig(learning_rate=0.01, gradient_clip=1.0)


def draw(step: int) -> dict[str, torch.Tensor]:
    """The weights (step -1) or the global gradients of a step: the first is clipped, the last is not."""
    generator = torch.Generator().manual_seed(100 + step)
    scale = 0.05 if step == STEPS - 1 else 1.0
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def one_process() -> tuple[dict[str, np.ndarray], list[float]]:
    weights = {name: Parameter(value) for name, value in draw(-1).items()}
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in weights.values() if p.ndim >= 2], "weight_decay": CONFIG.weight_decay},
            {"params": [p for p in weights.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=CONFIG.learning_rate,
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.epsilon,
    )
    norms = []
    for step in range(STEPS):
        for name, gradient in draw(step).items():
            weights[name].grad = gradient
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), CONFIG.gradient_clip).item())
        adamw.step()
    return {name: weight.detach().numpy() for name, weight in weights.items()}, norms


def train_rank(rank: int, strategies: list[Strategy]) -> list[tuple[dict[str, torch.Tensor], list[float]]]:
    groups = ProcessGroups.create(strategies[0])
    return [train_one(groups, strategy) for strategy in strategies]


def train_one(groups: ProcessGroups, strategy: Strategy) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same training on one rank, which contributes a share of the gradients of what it holds."""
    here = groups.coordinates
    experts = slice(*(EXPERTS // strategy.expert_parallel * n for n in (here.ep, here.ep + 1)))
    per_stage = 2 // strategy.pipeline_parallel
    held = [name for name in SHAPES if int(name.split(".")[1]) // per_stage == here.pp]

    def local(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensors[name][experts] if is_expert(name) else tensors[name] for name in held}

    def share(name: str) -> float:
        """Uneven shares of the copies' ranks that add up to one."""
        index, ranks = (
            (here.edp, strategy.expert_data_parallel) if is_expert(name) else (here.dp, strategy.data_parallel)
        )
        return 2 * (index + 1) / (ranks * (ranks + 1))

    weights = {name: Parameter(value.clone()) for name, value in local(draw(-1)).items()}
    flats = flatten(weights.items(), groups, strategy)
    sharding, optimizer = Sharding(Meter()), Optimizer(flats, CONFIG)
    sharding.take(flats)
    norms = []
    for step in range(STEPS):
        gradients = local(draw(step))
        for _ in range(2):  # two micro-batches accumulate
            for unit, names in groupby(held, key=unit_of):
                sharding.open_gradients(unit)
                for name in names:
                    weights[name].backward(gradients[name] * share(name) / 2)
                sharding.reduce_gradients(unit)
        sharding.settle()
        optimizer.reduce_gradients()
        squared = optimizer.owned_squared_norm()
        torch.distributed.all_reduce(squared)
        norms.append(squared.sqrt().item())
        optimizer.update(norms[-1], CONFIG.learning_rate)
        optimizer.gather_weights()
        optimizer.zero_gradients()
    updated = {}
    for unit, names in groupby(held, key=unit_of):
        with sharding.weights(unit):
            updated |= {name: weights[name].detach().clone() for name in names}
    return updated, norms


ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "dp4": {"data_parallel": 4, "expert_data_parallel": 4},
    "ep4": {"data_parallel": 4, "expert_parallel": 4},
    "ep2 edp2": {"data_parallel": 4, "expert_parallel": 2, "expert_data_parallel": 2},
    "pp2 ep2": {"pipeline_parallel": 2, "data_parallel": 2, "expert_parallel": 2},
    "pp2 edp2": {"pipeline_parallel": 2, "data_parallel": 2, "expert_data_parallel": 2},
}


@pytest.mark.distributed
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_norm_and_weights_equal_one_process_at_every_zero_level(arrangement):
    strategies = [
        Strategy(**ARRANGEMENTS[arrangement], zero_dense=zero_dense, zero_expert=zero_expert)
        for zero_dense, zero_expert in ((0, 0), (1, 1), (1, 0), (2, 2), (3, 3), (1, 3), (3, 2))
    ]
    weights, norms = one_process()
    answers = run_ranks(train_rank, 4, strategies)
    for level, strategy in enumerate(strategies):
        for rank, (held, rank_norms) in enumerate(answer[level] for answer in answers):
            where = f"on rank {rank} of {strategy.compact()}"
            np.testing.assert_allclose(rank_norms, norms, rtol=1e-6, err_msg=f"norm {where}")
            size = EXPERTS // strategy.expert_parallel
            first = rank % strategy.expert_parallel * size
            for name, weight in held.items():
                expected = weights[name][first : first + size] if is_expert(name) else weights[name]
                np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-6, err_msg=f"{name} {where}")
        assert {name for answer in answers for name in answer[level][0]} == set(SHAPES)


def held_bytes(rank: int, strategy: Strategy, dtype: torch.dtype) -> dict[str, int]:
    groups = ProcessGroups.create(strategy)
    weights = [(name, Parameter(torch.zeros(shape, dtype=dtype))) for name, shape in SHAPES.items()]
    optimizer = Optimizer(flatten(weights, groups, strategy), CONFIG)
    return {category: sum(t.nbytes for t in tensors) for category, tensors in optimizer.tensors().items()}


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_each_zero_level_keeps_one_shard_more(zero, dtype):
    """16 bytes a parameter in fp32; in bf16 18, of which 2 are weights, 4 gradients and 12 master and moments."""
    strategy = Strategy(data_parallel=2, expert_data_parallel=2, zero_dense=zero, zero_expert=zero)
    total = sum(int(np.prod(shape)) for shape in SHAPES.values())
    # No padding: 42 dense and 84 expert parameters in each layer, 2 ranks.
    weights, state = (4, 8) if dtype == torch.float32 else (2, 12)
    for held in run_ranks(held_bytes, 2, strategy, dtype):
        assert held == {
            "weights": weights * total // (2 if zero >= 3 else 1),
            "gradients": 4 * total // (2 if zero >= 2 else 1),
            "optimizer": state * total // (2 if zero >= 1 else 1),
        }

"""Selective recomputation changes no number, costs the products that it names once, and keeps less."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
import torch.distributed as dist
from tests.runtime.tiny import MODELS, TRAIN, batch_for, engine_for, job_of
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from pipermoe.dryrun.dry_run import dry_run
from pipermoe.modules.rebuild import rebuilding
from pipermoe.resources.flops import layer_forward_flops
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.specs.footprint import Footprint
from pipermoe.specs.model import GroupedQueryAttention
from pipermoe.specs.strategy import RECOMPUTE_MODULES, RecomputeModule, Strategy


@pytest.fixture
def alone() -> Iterator[ProcessGroups]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield ProcessGroups.create(Strategy())
    dist.destroy_process_group()


def gradients(model: str, strategy: Strategy, groups: ProcessGroups) -> dict[str, Tensor]:
    engine = engine_for(MODELS[model], strategy, groups, job_of(model))
    engine.step(batch_for(strategy, 0, 0))
    return {name: parameter.grad for name, parameter in engine.named_parameters() if parameter.grad is not None}


CASES = [*((model, RECOMPUTE_MODULES) for model in MODELS), ("rich", ("norm",)), ("older", ("moe_act",))]


@pytest.mark.parametrize(("model", "modules"), CASES)
def test_gradients_are_the_same_bit_for_bit(model: str, modules: tuple[RecomputeModule, ...], alone: ProcessGroups):
    kept = gradients(model, Strategy(), alone)
    rebuilt = gradients(model, Strategy(recompute="selective", recompute_modules=modules), alone)
    assert set(kept) == set(rebuilt)
    for name, gradient in kept.items():
        assert torch.equal(gradient, rebuilt[name]), name


@cache
def footprint(*modules: RecomputeModule) -> Footprint:
    """One micro-batch of everything."""
    recompute = "selective" if modules else "none"
    strategy = Strategy(recompute=recompute, recompute_modules=modules, micro_batch_size=8)
    return dry_run(MODELS["rich"], TRAIN, strategy, rank=0)


def test_a_module_is_computed_once_more_up_to_the_input_of_its_last_product():
    model, tokens = MODELS["rich"], TRAIN.tokens_per_step
    attention = model.attention
    assert isinstance(attention, GroupedQueryAttention)
    output = 2 * tokens * model.hidden_size * attention.num_heads * attention.head_dim
    layers = [
        layer_forward_flops(model, each, tokens=tokens, seq_len=TRAIN.seq_len, causal=False)
        for each in range(model.num_layers)
    ]
    up = 2 / 3  # of the three matrices of a gated block
    gate = 2 * tokens * model.hidden_size * len(model.moe_layers)
    expected: dict[RecomputeModule, float] = {
        "norm": 0,
        "attention": sum(each.attention_projections + each.attention_core - output for each in layers),
        "moe_act": 0,
        "experts": up * sum(each.routed_experts for each in layers),
        "shared_experts": up * (sum(each.shared_experts for each in layers) - gate),
        "dense_mlp": up * sum(each.dense_mlp for each in layers),
    }
    plain = footprint()
    for module, flops in expected.items():
        one = footprint(module)
        assert one.report.flops - plain.report.flops == flops, module
        assert one.report.traffic == plain.report.traffic, module
    everything = footprint(*RECOMPUTE_MODULES)
    assert everything.report.flops - plain.report.flops == sum(expected.values())


@pytest.mark.parametrize("module", RECOMPUTE_MODULES)
def test_what_is_rebuilt_is_not_kept(module: RecomputeModule):
    assert footprint(module).report.peak_bytes < footprint().report.peak_bytes


def test_what_several_read_is_rebuilt_once():
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(1)
        return x * 2

    x = torch.ones(3, requires_grad=True)
    rebuilding(True, double, lambda y: y * y * y, x).sum().backward()
    assert len(calls) == 2
    assert x.grad is not None
    assert x.grad.tolist() == [24.0] * 3

"""The engine against the model written out in a page of ordinary autograd, head by head and expert by expert."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from tests.runtime.tiny import MODELS, TRAIN, batch_for, engine_for, job_of
from tests.runtime.written_out import loss_of_step, losses
from torch._C._distributed_c10d import HashStore

from pipermoe.modules.weight_gradients import gradient_of
from pipermoe.resources.parameters import (
    embedding_parameters,
    final_norm_parameters,
    head_parameters,
    layer_parameters,
    mtp_parameters,
)
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.specs.strategy import Strategy


@pytest.fixture
def alone() -> Iterator[ProcessGroups]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield ProcessGroups.create(Strategy())
    dist.destroy_process_group()


def draw(engine: Engine) -> None:
    """Values for everything that is not drawn at the start: biases, sinks, norms."""
    generator = torch.Generator().manual_seed(5)
    for _, tensor in engine.named_state():
        if tensor.detach().std(correction=0) == 0:
            tensor.data.add_(0.2 * torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_model_written_out(name: str, recompute, alone: ProcessGroups):
    model, train, strategy = MODELS[name], job_of(name), Strategy(micro_batch_size=2, recompute=recompute)
    engine = engine_for(model, strategy, alone, train)
    draw(engine)
    batch = batch_for(strategy, 0, 0)
    w = {name: tensor.detach().clone().requires_grad_() for name, tensor in engine.named_state()}
    means = loss_of_step(model, train, w, batch)
    weights = torch.tensor((1.0, train.mtp_loss_weight, train.auxiliary_loss, train.z_loss))
    (weights @ means).backward()
    result = engine.step(batch)
    found = torch.stack((result.loss, result.mtp_loss, result.auxiliary, result.z_loss))
    torch.testing.assert_close(found, means.detach())
    for name, parameter in engine.named_parameters():
        torch.testing.assert_close(parameter.grad, w[name].grad, msg=lambda text, name=name: f"{name}: {text}")
    evaluation = engine.evaluate(batch)
    torch.testing.assert_close(evaluation.loss, result.loss, rtol=0, atol=0)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", ["latent", "older"])
def test_a_correction_bias_moves_towards_the_experts_that_had_less_than_their_share(
    name: str, recompute, alone: ProcessGroups
):
    model = MODELS[name]
    engine = engine_for(model, Strategy(recompute=recompute), alone, TRAIN.model_copy(update={"balance_rate": 0.25}))
    batch = batch_for(Strategy(), 0, 0)
    w = {name: tensor.detach().clone() for name, tensor in engine.named_state()}
    seen = torch.zeros(model.num_layers, model.moe.num_experts)
    for tokens in batch:
        losses(model, TRAIN, w, tokens, seen)
    for _ in range(2):  # the load of one step, not of all
        engine.step(batch)
    engine.evaluate(batch_for(Strategy(), 0, 1))  # which does not count
    engine.move_correction_biases()
    mean = TRAIN.tokens_per_step * model.moe.top_k / model.moe.num_experts
    moved = {name: tensor for name, tensor in engine.named_state() if name.endswith("correction_bias")}
    assert set(moved) == {f"layers.{layer}.router.correction_bias" for layer in model.moe_layers}
    for layer in model.moe_layers:
        assert torch.equal(moved[f"layers.{layer}.router.correction_bias"], 0.25 * (mean - seen[layer]).sign())


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_holds_as_many_parameters_as_the_spec_counts(name: str, alone: ProcessGroups):
    model = MODELS[name]
    engine = engine_for(model, Strategy(), alone)
    counted = engine.named_state() if model.moe.router.correction_bias == "parameter" else engine.named_parameters()
    held = sum(tensor.numel() for _, tensor in counted)
    layers = sum(layer_parameters(model, layer).total for layer in range(model.num_layers))
    ends = embedding_parameters(model) + head_parameters(model) + final_norm_parameters(model)
    assert held == layers + ends + mtp_parameters(model)


def test_bf16_trains(alone: ProcessGroups):
    train = TRAIN.model_copy(update={"precision": "bf16"})
    engine = engine_for(MODELS["rich"], Strategy(), alone, train)
    exact = engine_for(MODELS["rich"], Strategy(), alone)
    batch = batch_for(Strategy(), 0, 0)
    assert engine.step(batch).loss.item() == pytest.approx(exact.step(batch).loss.item(), rel=1e-2)
    assert {gradient_of(parameter).dtype for _, parameter in engine.named_parameters()} == {torch.float32}


def test_terms_add_up_to_at_most_the_step(alone: ProcessGroups):
    engine = engine_for(MODELS["plain"], Strategy(), alone)
    engine.meter.reset()
    start = time.perf_counter()
    engine.step(batch_for(Strategy(), 0, 0))
    elapsed = time.perf_counter() - start
    assert engine.meter.seconds["forward"] > 0
    assert engine.meter.seconds["backward"] > 0
    assert sum(engine.meter.seconds.values()) <= elapsed

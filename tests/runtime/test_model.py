"""The engine against the model written out in a page of ordinary autograd, token by token and expert by expert."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.runtime.tiny import MODELS, TRAIN, batch_for, engine_for
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from pipermoe.resources.parameters import embedding_parameters, final_norm_parameters, head_parameters, layer_parameters
from pipermoe.runtime.gradients import gradient_of
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.specs.model import GroupedQueryAttention, ModelSpec
from pipermoe.specs.strategy import Strategy


@pytest.fixture
def alone() -> Iterator[ProcessGroups]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield ProcessGroups.create(Strategy())
    dist.destroy_process_group()


def reference_loss(model: ModelSpec, w: dict[str, Tensor], tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and mean load-balancing loss of one micro-batch."""
    x_BSD, balance = w["embedding.weight"][tokens_BS[:, :-1]], []
    for layer in range(model.num_layers):
        p = {name.removeprefix(f"layers.{layer}."): value for name, value in w.items() if f"layers.{layer}." in name}
        x_BSD = x_BSD + attention(model, p, norm(model, x_BSD, p["attention_norm.weight"]))
        n_TD = norm(model, x_BSD, p["ffn_norm.weight"]).flatten(0, 1)
        if model.is_moe(layer):
            y_TD, auxiliary = mixture(model, p, n_TD)
            balance.append(auxiliary)
        else:
            y_TD = mlp(n_TD, p["mlp.gate_up.weight"].t(), p["mlp.down.weight"].t())
        x_BSD = x_BSD + y_TD.view_as(x_BSD)
    head = w["embedding.weight"] if model.tie_word_embeddings else w["head.weight"]
    logits = norm(model, x_BSD, w["final_norm.weight"]) @ head.t()
    return F.cross_entropy(logits.flatten(0, 1), tokens_BS[:, 1:].flatten()), torch.stack(balance).mean()


def norm(model: ModelSpec, x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, model.norm_epsilon)


def attention(model: ModelSpec, p: dict[str, Tensor], x_BSD: Tensor) -> Tensor:
    """Complex rotary positions and a loop over heads."""
    spec = model.attention
    assert isinstance(spec, GroupedQueryAttention)
    q, k, v = (
        F.linear(x_BSD, p[f"attention.{n}.weight"], p.get(f"attention.{n}.bias")) for n in ("query", "key", "value")
    )
    if spec.qk_norm == "full":
        q, k = norm(model, q, p["attention.query_norm.weight"]), norm(model, k, p["attention.key_norm.weight"])
    position, half = torch.arange(x_BSD.shape[1]), spec.head_dim // 2
    angle = position[:, None] * spec.rope_theta ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones_like(angle), angle)
    masked = torch.full((len(position), len(position)), float("-inf")).triu(1)
    heads = []
    for head in range(spec.num_heads):
        shared = head * spec.num_kv_heads // spec.num_heads
        query, key, value = (
            t[..., i * spec.head_dim : (i + 1) * spec.head_dim] for t, i in ((q, head), (k, shared), (v, shared))
        )
        if spec.qk_norm == "head":
            query = norm(model, query, p["attention.query_norm.weight"])
            key = norm(model, key, p["attention.key_norm.weight"])
        query, key = (torch.view_as_real(torch.complex(*t.chunk(2, -1)) * turn) for t in (query, key))
        scores = torch.einsum("bscz,btcz->bst", query, key) / spec.head_dim**0.5
        heads.append((scores + masked).softmax(-1) @ value)
    return F.linear(torch.cat(heads, -1), p["attention.output.weight"], p.get("attention.output.bias"))


def mlp(x_TD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x_TD @ gate_up).chunk(2, -1)
    return (F.silu(gate) * up) @ down


def mixture(model: ModelSpec, p: dict[str, Tensor], x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Every expert computes every token; the router's weights, zero for those not chosen, add them up."""
    moe = model.moe
    logits = F.linear(x_TD, p["router.weight"], p.get("router.bias"))
    scores = logits.softmax(-1) if moe.router.score == "softmax" else logits.sigmoid()
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(moe.top_k).indices, 1.0)
    weights = scores * chosen
    if moe.router.normalize_top_k:
        weights = weights / weights.sum(-1, keepdim=True)
    experts = zip(p["experts.gate_up.weight"], p["experts.down.weight"], strict=True)
    y_TED = torch.stack([mlp(x_TD, gate_up, down) for gate_up, down in experts], 1)
    y_TD = (weights[..., None] * y_TED).sum(1) * moe.router.scaling_factor
    if moe.shared_width:
        shared = mlp(x_TD, p["shared.gate_up.weight"].t(), p["shared.down.weight"].t())
        y_TD = y_TD + (shared * (x_TD @ p["shared.gate.weight"].t()).sigmoid() if moe.shared_gate else shared)
    share = scores / scores.sum(-1, keepdim=True)
    return y_TD, moe.num_experts * (chosen.mean(0) / moe.top_k * share.mean(0)).sum()


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_model_written_out(name: str, recompute, alone: ProcessGroups):
    model, strategy = MODELS[name], Strategy(micro_batch_size=2, recompute=recompute)
    engine = engine_for(model, strategy, alone)
    batch = batch_for(strategy, 0, 0)
    w = {name: parameter.detach().clone().requires_grad_() for name, parameter in engine.named_parameters()}
    means = torch.stack([torch.stack(reference_loss(model, w, tokens)) for tokens in batch]).mean(0)
    (means[0] + TRAIN.auxiliary_loss * means[1]).backward()
    result = engine.step(batch)
    torch.testing.assert_close(torch.stack((result.loss, result.auxiliary)), means.detach())
    for name, parameter in engine.named_parameters():
        torch.testing.assert_close(parameter.grad, w[name].grad, msg=lambda text, name=name: f"{name}: {text}")
    evaluation = engine.evaluate(batch)
    torch.testing.assert_close(evaluation.loss, result.loss, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_holds_as_many_parameters_as_the_spec_counts(name: str, alone: ProcessGroups):
    model = MODELS[name]
    held = sum(parameter.numel() for _, parameter in engine_for(model, Strategy(), alone).named_parameters())
    layers = sum(layer_parameters(model, layer).total for layer in range(model.num_layers))
    assert held == layers + embedding_parameters(model) + head_parameters(model) + final_norm_parameters(model)


def test_bf16_trains(alone: ProcessGroups):
    train = TRAIN.model_copy(update={"precision": "bf16"})
    engine = engine_for(MODELS["rich"], Strategy(), alone, train)
    exact = engine_for(MODELS["rich"], Strategy(), alone)
    batch = batch_for(Strategy(), 0, 0)
    assert engine.step(batch).loss.item() == pytest.approx(exact.step(batch).loss.item(), rel=1e-2)
    assert {gradient_of(parameter).dtype for _, parameter in engine.named_parameters()} == {torch.bfloat16}


def test_terms_add_up_to_at_most_the_step(alone: ProcessGroups):
    engine = engine_for(MODELS["plain"], Strategy(), alone)
    engine.meter.reset()
    start = time.perf_counter()
    engine.step(batch_for(Strategy(), 0, 0))
    elapsed = time.perf_counter() - start
    assert engine.meter.seconds["forward"] > 0
    assert engine.meter.seconds["backward"] > 0
    assert sum(engine.meter.seconds.values()) <= elapsed

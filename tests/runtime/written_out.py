"""The model in ordinary autograd: a loop over heads, all experts compute all tokens, masks instead of blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipermoe.specs.model import GroupedQueryAttention, LatentAttention, ModelSpec, Yarn
from pipermoe.specs.train import TrainConfig

Weights = dict[str, Tensor]


def loss_of_step(model: ModelSpec, train: TrainConfig, w: Weights, batch: Tensor) -> Tensor:
    """Cross-entropy, its mean over predictions further ahead, load-balancing loss and z-loss (4,) of the micro-batches
    of one process, averaged."""
    seen = torch.zeros(model.num_layers + model.mtp_layers, model.moe.num_experts)  # choices up to this micro-batch
    return torch.stack([torch.stack(losses(model, train, w, tokens, seen)) for tokens in batch]).mean(0)


def losses(model: ModelSpec, train: TrainConfig, w: Weights, tokens_BS: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
    """Means over the tokens of one micro-batch and the MoE layers; counts its choices in `seen`."""
    state_BSD, routed = states(model, w, tokens_BS[:, :-1])
    entropy = F.cross_entropy(logits(model, w, state_BSD).flatten(0, 1), tokens_BS[:, 1:].flatten())
    ahead = further_ahead(model, w, state_BSD, tokens_BS, routed)
    balance, z = [], []
    for layer, (router_logits, scores, chosen) in routed.items():
        share = scores / scores.sum(-1, keepdim=True)
        seen[layer] += chosen.sum(0)
        load, mean = (each.unflatten(0, (len(tokens_BS), -1)).mean(1) for each in (chosen / model.moe.top_k, share))
        if train.auxiliary_loss_level == "micro_batch":
            load, mean = load.mean(0), mean.mean(0)
        elif train.auxiliary_loss_level == "global_batch":
            load, mean = seen[layer] / seen[layer].sum(), mean.mean(0)
        balance.append(model.moe.num_experts * (load * mean).sum(-1).mean())
        z.append(router_logits.logsumexp(-1).square().mean() if train.z_loss else torch.zeros(()))
    return entropy, ahead, torch.stack(balance).mean(), torch.stack(z).mean()


Routed = dict[int, tuple[Tensor, ...]]  # of every MoE layer router logits, scores and choices (T, E)


def states(model: ModelSpec, w: Weights, tokens_BS: Tensor) -> tuple[Tensor, Routed]:
    """What the head reads (B, S, D)."""
    x_BSD, routed = w["embedding.weight"][tokens_BS], {}
    for layer in range(model.num_layers):
        x_BSD = transformed(model, layer, of_layer(w, layer), x_BSD, routed)
    return norm(model, x_BSD, w, "final_norm"), routed


def logits(model: ModelSpec, w: Weights, state_BSD: Tensor) -> Tensor:
    head = w["embedding.weight"] if model.tie_word_embeddings else w["head.weight"]
    return F.linear(state_BSD, head, w.get("head.bias"))


def further_ahead(model: ModelSpec, w: Weights, state_BSD: Tensor, tokens_BS: Tensor, routed: Routed) -> Tensor:
    """The mean over depths k of the entropies of token i + k + 1 given those up to i + k, for all i that have it.

    DeepSeek-V3, arXiv 2412.19437, equations 21 to 25. Behind the end all tokens are 0, as experts count them too.
    """
    length, entropies = state_BSD.shape[1], []
    for k in range(1, model.mtp_layers + 1):
        p = of_layer(w, model.num_layers + k - 1)
        tokens = [[*row[k:], *[0] * (k - 1)] for row in tokens_BS.tolist()]
        token_BSD = norm(model, w["embedding.weight"][torch.tensor(tokens)], p, "token_norm")
        x_BSD = linear(p, "projection", torch.cat((token_BSD, norm(model, state_BSD, p, "state_norm")), -1))
        x_BSD = transformed(model, model.num_layers + k - 1, p, x_BSD, routed)
        state_BSD = norm(model, x_BSD, p, "head_norm")
        logits_BSV = logits(model, w, state_BSD[:, : length - k])
        total = F.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, k + 1 :].flatten(), reduction="sum")
        entropies.append(total / (len(tokens_BS) * length))
    return torch.stack(entropies).mean() if entropies else torch.zeros(())


def of_layer(w: Weights, layer: int) -> Weights:
    return {name.removeprefix(f"layers.{layer}."): value for name, value in w.items() if f"layers.{layer}." in name}


def transformed(model: ModelSpec, layer: int, p: Weights, x_BSD: Tensor, routed: Routed) -> Tensor:
    """One layer."""
    n_BSD = norm(model, x_BSD, p, "attention_norm")
    heads = latent_heads if isinstance(model.attention, LatentAttention) else grouped_heads
    visible = mask(model, layer, x_BSD.shape[1])
    attended = torch.cat([core(*head, visible) for head in heads(model, layer, p, n_BSD)], -1)
    x_BSD = x_BSD + linear(p, "attention.output", attended)
    n_TD = norm(model, x_BSD, p, "ffn_norm").flatten(0, 1)
    if model.is_moe(layer):
        y_TD, routed[layer] = mixture(model, p, n_TD)
    else:
        y_TD = feed_forward(p, "mlp", n_TD)
    return x_BSD + y_TD.view_as(x_BSD)


def linear(p: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def norm(model: ModelSpec, x: Tensor, p: Weights, name: str) -> Tensor:
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
    if bias is not None:
        return F.layer_norm(x, weight.shape, weight, bias, model.norm_epsilon)
    return F.rms_norm(x, weight.shape, weight, model.norm_epsilon)


def mask(model: ModelSpec, layer: int, seq_len: int) -> Tensor:
    """Which keys (columns) a query sees."""
    query, key = torch.arange(seq_len)[:, None], torch.arange(seq_len)
    visible, local = query >= key, model.local_attention
    if local is None or layer not in local.layers:
        return visible
    near = query - key < local.size if local.kind == "sliding" else query // local.size == key // local.size
    return visible & near


def core(query: Tensor, key: Tensor, value: Tensor, scale: float, sink: Tensor | None, visible: Tensor) -> Tensor:
    """One head: the sink is one more column of logits whose probability goes nowhere."""
    fit = (query @ key.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
    if sink is not None:
        fit = torch.cat((fit, sink.expand(*fit.shape[:-1], 1)), -1)
    return fit.softmax(-1)[..., : key.shape[-2]] @ value


def turned(x_BSC: Tensor, theta: float, yarn: Yarn | None) -> Tensor:
    """Rotary positions as products of complex numbers; YaRN pair by pair as its paper says it."""
    half = x_BSC.shape[-1] // 2
    frequency = theta ** (-torch.arange(half) / half)
    amplitude = 1.0
    if yarn is not None:
        turns = [math.log(yarn.original_positions / (beta * 2 * math.pi)) for beta in (yarn.beta_fast, yarn.beta_slow)]
        low, high = (half * turn / math.log(theta) for turn in turns)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        ramp = torch.tensor([min(max((i - low) / (high - low), 0), 1) for i in range(half)])
        frequency = frequency * (1 - ramp + ramp / yarn.factor)
        grown = [0.1 * m * math.log(yarn.factor) + 1 for m in (yarn.mscale, yarn.mscale_all_dim)]
        amplitude = grown[0] / grown[1] if yarn.mscale else 0.1 * math.log(yarn.factor) + 1
    angle = torch.arange(x_BSC.shape[1])[:, None] * frequency
    turn = torch.polar(torch.full_like(angle, amplitude), angle)
    product = torch.complex(*x_BSC.chunk(2, -1)) * turn
    return torch.cat((product.real, product.imag), -1)


def grouped_heads(model: ModelSpec, layer: int, p: Weights, x_BSD: Tensor):
    """Query, key, value, scale and sink of every head."""
    spec = model.attention
    assert isinstance(spec, GroupedQueryAttention)
    q, k, v = (linear(p, f"attention.{name}", x_BSD) for name in ("query", "key", "value"))
    if spec.qk_norm == "full":
        q, k = norm(model, q, p, "attention.query_norm"), norm(model, k, p, "attention.key_norm")
    for head in range(spec.num_heads):
        shared = head * spec.num_kv_heads // spec.num_heads
        query, key, value = (
            t[..., i * spec.head_dim : (i + 1) * spec.head_dim] for t, i in ((q, head), (k, shared), (v, shared))
        )
        if spec.qk_norm == "head":
            query, key = norm(model, query, p, "attention.query_norm"), norm(model, key, p, "attention.key_norm")
        if layer not in model.no_rope_layers:
            part = spec.rotary_dim or spec.head_dim
            query, key = (
                torch.cat((turned(each[..., :part], spec.rope_theta, spec.yarn), each[..., part:]), -1)
                for each in (query, key)
            )
            if spec.qk_norm == "l2":
                query, key = (F.rms_norm(each, each.shape[-1:], eps=model.norm_epsilon) for each in (query, key))
        sink = p["attention.sinks"][head] if spec.sinks else None
        yield query, key, value, spec.head_dim**-0.5, sink


def latent_heads(model: ModelSpec, _: int, p: Weights, x_BSD: Tensor):
    spec = model.attention
    assert isinstance(spec, LatentAttention)
    if spec.q_lora_rank:
        short = norm(model, linear(p, "attention.query_down", x_BSD), p, "attention.query_norm")
        queries = linear(p, "attention.query_up", short)
    else:
        queries = linear(p, "attention.query", x_BSD)
    latent = linear(p, "attention.latent", x_BSD)
    rotary_key = turned(latent[..., spec.kv_lora_rank :], spec.rope_theta, spec.yarn)
    normed = norm(model, latent[..., : spec.kv_lora_rank], p, "attention.latent_norm")
    expanded = linear(p, "attention.key_value", normed)
    scale = spec.query_key_dim**-0.5
    if spec.yarn:
        scale *= (0.1 * spec.yarn.mscale_all_dim * math.log(spec.yarn.factor) + 1) ** 2
    for query, both in zip(queries.chunk(spec.num_heads, -1), expanded.chunk(spec.num_heads, -1), strict=True):
        plain, rotary = query.split((spec.qk_nope_head_dim, spec.qk_rope_head_dim), -1)
        key, value = both.split((spec.qk_nope_head_dim, spec.v_head_dim), -1)
        turned_query = turned(rotary, spec.rope_theta, spec.yarn)
        yield torch.cat((plain, turned_query), -1), torch.cat((key, rotary_key), -1), value, scale, None


def feed_forward(p: Weights, name: str, x_TD: Tensor) -> Tensor:
    if f"{name}.up.weight" in p:
        return linear(p, f"{name}.down", linear(p, f"{name}.up", x_TD).relu())
    gate, up = linear(p, f"{name}.gate_up", x_TD).chunk(2, -1)
    return linear(p, f"{name}.down", F.silu(gate) * up)


def expert(model: ModelSpec, p: Weights, index: int, x_TD: Tensor) -> Tensor:
    """Experts keep their matrices as (in, out)."""

    def product(name: str, x: Tensor) -> Tensor:
        bias = p.get(f"experts.{name}.bias")
        return x @ p[f"experts.{name}.weight"][index] + (0 if bias is None else bias[index])

    if model.moe.expert_matrices == 2:
        return product("down", product("up", x_TD).relu())
    gate, up = product("gate_up", x_TD).chunk(2, -1)
    limit = model.moe.swiglu_limit
    if limit:
        gate = gate.clamp(max=limit)
        return product("down", gate * torch.sigmoid(1.702 * gate) * (up.clamp(-limit, limit) + 1))
    return product("down", F.silu(gate) * up)


def mixture(model: ModelSpec, p: Weights, x_TD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Every expert computes every token; the router's weights, zero for those not chosen, add them up."""
    moe = model.moe
    routed = linear(p, "router", x_TD)
    scores = routed.softmax(-1) if moe.router.score == "softmax" else routed.sigmoid()
    chosen = torch.stack([choice(model, p, token) for token in scores.detach()])
    weights = scores * chosen
    if moe.router.normalize_top_k:
        weights = weights / weights.sum(-1, keepdim=True)
    y_TED = torch.stack([expert(model, p, index, x_TD) for index in range(moe.num_experts)], 1)
    y_TD = (weights[..., None] * y_TED).sum(1) * moe.router.scaling_factor
    if moe.shared_width:
        shared = feed_forward(p, "shared", x_TD)
        y_TD = y_TD + (shared * (x_TD @ p["shared.gate.weight"].t()).sigmoid() if moe.shared_gate else shared)
    return y_TD, (routed, scores, chosen)


def choice(model: ModelSpec, p: Weights, scores_E: Tensor) -> Tensor:
    """1 for the chosen experts of one token."""
    router, width = model.moe.router, model.moe.num_experts // model.moe.router.num_groups
    bias = p.get("router.correction_bias")
    ranked = scores_E if bias is None else scores_E + bias
    values, counted = ranked.tolist(), 1 if bias is None else 2
    worth = [(sum(sorted(values[g * width :][:width])[-counted:]), g) for g in range(router.num_groups)]
    open_groups = [g for _, g in sorted(worth)[-router.top_k_groups :]] if router.num_groups > 1 else [0]
    candidates = sorted((value, e) for e, value in enumerate(values) if e // width in open_groups)
    chosen = torch.zeros_like(scores_E)
    chosen[[e for _, e in candidates[-model.moe.top_k :]]] = 1.0
    return chosen

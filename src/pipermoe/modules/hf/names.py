"""Hugging Face's names of this runtime's tensors, family by family: tables, and the two orders of rows they need.

`theirs` of an expert's tensor either says `{expert}` and is one expert's (out, in), or holds all experts at once,
(experts, in, out). Several names are the parts of one of ours, in the order of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipermoe.specs.model import LatentAttention, ModelSpec

Order = Callable[[ModelSpec], Tensor]


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor of ours: the names of its parts, and where each output lies in them (`order(model)`; None: as ours).

    Names of a layer's tensors follow `model.layers.N.`, of all others nothing.
    """

    theirs: tuple[str, ...]
    order: Order | None = None

    @property
    def by_expert(self) -> bool:
        return "{expert}" in self.theirs[0]


Rules = dict[str, Rule]


def named(*theirs: str, order: Order | None = None) -> Rule:
    return Rule(theirs, order)


def linear(ours: str, *theirs: str, order: Order | None = None) -> Rules:
    """Weight and bias of a projection."""
    return {f"{ours}.{kind}": Rule(tuple(f"{name}.{kind}" for name in theirs), order) for kind in ("weight", "bias")}


def _split_pairs(count: int) -> Tensor:
    """Neighbours (x0, x1), (x2, x3) become halves x0, x2, ... and x1, x3, ..."""
    return torch.arange(count).view(-1, 2).t().flatten()


def _interleaved_gate_up(model: ModelSpec) -> Tensor:
    return _split_pairs(2 * model.moe.expert_width)


def _rotary_queries(model: ModelSpec) -> Tensor:
    """DeepSeek turns neighbouring numbers of a head's rotary end; halves, as here, give the same logits."""
    spec = model.attention
    assert isinstance(spec, LatentAttention)
    plain, rotary = torch.arange(spec.qk_nope_head_dim), _split_pairs(spec.qk_rope_head_dim) + spec.qk_nope_head_dim
    starts = torch.arange(spec.num_heads)[:, None] * spec.query_key_dim
    return (starts + torch.cat((plain, rotary))).flatten()


def _rotary_key(model: ModelSpec) -> Tensor:
    """The key's rotary part lies behind the latent vector."""
    spec = model.attention
    assert isinstance(spec, LatentAttention)
    rotary = _split_pairs(spec.qk_rope_head_dim) + spec.kv_lora_rank
    return torch.cat((torch.arange(spec.kv_lora_rank), rotary))


_DECODER: Rules = {
    "embedding.weight": named("model.embed_tokens.weight"),
    "final_norm.weight": named("model.norm.weight"),
    "head.weight": named("lm_head.weight"),
    "attention_norm.weight": named("input_layernorm.weight"),
    "ffn_norm.weight": named("post_attention_layernorm.weight"),
    **linear("attention.output", "self_attn.o_proj"),
}
_GROUPED_QUERY: Rules = {
    **linear("attention.query", "self_attn.q_proj"),
    **linear("attention.key", "self_attn.k_proj"),
    **linear("attention.value", "self_attn.v_proj"),
    "attention.query_norm.weight": named("self_attn.q_norm.weight"),
    "attention.key_norm.weight": named("self_attn.k_norm.weight"),
}
_LATENT: Rules = {
    **linear("attention.query", "self_attn.q_proj", order=_rotary_queries),
    **linear("attention.query_down", "self_attn.q_a_proj"),
    "attention.query_norm.weight": named("self_attn.q_a_layernorm.weight"),
    **linear("attention.query_up", "self_attn.q_b_proj", order=_rotary_queries),
    **linear("attention.latent", "self_attn.kv_a_proj_with_mqa", order=_rotary_key),
    "attention.latent_norm.weight": named("self_attn.kv_a_layernorm.weight"),
    **linear("attention.key_value", "self_attn.kv_b_proj"),
}
_MLP: Rules = {
    **linear("mlp.gate_up", "mlp.gate_proj", "mlp.up_proj"),
    **linear("mlp.down", "mlp.down_proj"),
    "router.weight": named("mlp.gate.weight"),
    **linear("experts.gate_up", "mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj"),
    **linear("experts.down", "mlp.experts.{expert}.down_proj"),
}
_MIXTRAL: Rules = {
    **_DECODER,
    **_GROUPED_QUERY,
    "router.weight": named("block_sparse_moe.gate.weight"),
    **linear("experts.gate_up", "block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3"),
    **linear("experts.down", "block_sparse_moe.experts.{expert}.w2"),
}
_QWEN: Rules = {
    **_DECODER,
    **_GROUPED_QUERY,
    **_MLP,
    **linear("shared.gate_up", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    **linear("shared.down", "mlp.shared_expert.down_proj"),
    "shared.gate.weight": named("mlp.shared_expert_gate.weight"),
}
_DEEPSEEK: Rules = {
    **_DECODER,
    **_LATENT,
    **_MLP,
    "router.correction_bias": named("mlp.gate.e_score_correction_bias"),
    **linear("shared.gate_up", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    **linear("shared.down", "mlp.shared_experts.down_proj"),
    # Multi-token prediction.
    "token_norm.weight": named("enorm.weight"),
    "state_norm.weight": named("hnorm.weight"),
    "projection.weight": named("eh_proj.weight"),
    "head_norm.weight": named("shared_head.norm.weight"),
}
_GPT_OSS: Rules = {
    **_DECODER,
    **_GROUPED_QUERY,
    "attention.sinks": named("self_attn.sinks"),
    **linear("router", "mlp.router"),
    "experts.gate_up.weight": named("mlp.experts.gate_up_proj", order=_interleaved_gate_up),
    "experts.gate_up.bias": named("mlp.experts.gate_up_proj_bias", order=_interleaved_gate_up),
    "experts.down.weight": named("mlp.experts.down_proj"),
    "experts.down.bias": named("mlp.experts.down_proj_bias"),
}

# model_type -> rules
FAMILIES: dict[str, Rules] = {
    "mixtral": _MIXTRAL,
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "olmoe": _QWEN,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": _GPT_OSS,
}

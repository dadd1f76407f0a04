"""The attention block of a layer: grouped-query or latent.

B sequences, S positions, T = B * S tokens, D hidden size, H query heads, G key/value heads, C head dimension,
N query and key numbers without position, P with rotary position, V value dimension, L latent rank
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipermoe.modules.attention_core import causal_attention
from pipermoe.modules.linear import Linear
from pipermoe.modules.norm import RMSNorm, unit_rms
from pipermoe.modules.rebuild import rebuilding
from pipermoe.modules.rotary import Rotation, rotate
from pipermoe.modules.sinks import Sinks
from pipermoe.modules.weight_gradients import WeightGradients
from pipermoe.specs import model as specs


def build_attention(
    model: specs.ModelSpec, layer: int, seq_len: int, gradients: WeightGradients, dtype: torch.dtype, *, drop: bool
) -> Attention:
    """The attention of `layer`, the index of which decides whether it is local."""
    spec, local = model.attention, model.local_attention if model.is_local(layer) else None
    if isinstance(spec, specs.LatentAttention):
        attention = LatentAttention(model, spec, local, seq_len, gradients, dtype)
    else:
        turns = layer not in model.no_rope_layers
        attention = GroupedQueryAttention(model, spec, local, seq_len, gradients, dtype, turns=turns)
    attention.drop = drop
    return attention


class Attention(nn.Module):
    """`output(gathered(x))`; with `drop` what lies between is rebuilt in backward."""

    output: Linear
    drop = False

    def gathered(self, x_TD: Tensor, rotation: Rotation) -> Tensor:
        raise NotImplementedError

    def forward(self, x_TD: Tensor, rotation: Rotation) -> Tensor:
        return rebuilding(self.drop, lambda x_TD: self.gathered(x_TD, rotation), self.output, x_TD)


class GroupedQueryAttention(Attention):
    """Causal self-attention (GQA: Ainslie et al. 2023) with optional query and key norms and, if `turns`, positions."""

    def __init__(
        self,
        model: specs.ModelSpec,
        spec: specs.GroupedQueryAttention,
        local: specs.LocalAttention | None,
        seq_len: int,
        gradients: WeightGradients,
        dtype: torch.dtype,
        *,
        turns: bool,
    ):
        super().__init__()
        self.spec, self.local, self.seq_len, self.epsilon = spec, local, seq_len, model.norm_epsilon
        self.gradients, self.turns = gradients, turns
        hidden, query, key_value = model.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.query = Linear(hidden, query, gradients, bias=spec.qkv_bias, dtype=dtype)
        self.key = Linear(hidden, key_value, gradients, bias=spec.qkv_bias, dtype=dtype)
        self.value = Linear(hidden, key_value, gradients, bias=spec.qkv_bias, dtype=dtype)
        self.output = Linear(query, hidden, gradients, bias=spec.output_bias, dtype=dtype)
        if spec.qk_norm in ("head", "full"):
            head = spec.qk_norm == "head"
            self.query_norm = RMSNorm(spec.head_dim if head else query, model.norm_epsilon, gradients, dtype=dtype)
            self.key_norm = RMSNorm(spec.head_dim if head else key_value, model.norm_epsilon, gradients, dtype=dtype)
        self.sinks = nn.Parameter(torch.empty(spec.num_heads, dtype=dtype)) if spec.sinks else None

    def gathered(self, x_TD: Tensor, rotation: Rotation) -> Tensor:
        """What the heads gather for every token (T, H * C), the input of the output projection."""
        query, key, value = self.query(x_TD), self.key(x_TD), self.value(x_TD)
        if self.spec.qk_norm == "full":
            query, key = self.query_norm(query), self.key_norm(key)
        query_BHSC, key_BGSC, value_BGSC = self._heads(query), self._heads(key), self._heads(value)
        if self.spec.qk_norm == "head":
            query_BHSC, key_BGSC = self.query_norm(query_BHSC), self.key_norm(key_BGSC)
        elif self.spec.qk_norm == "l2" and self.turns:  # a rotation changes no length, so before or after is the same
            query_BHSC, key_BGSC = unit_rms(query_BHSC, self.epsilon), unit_rms(key_BGSC, self.epsilon)
        if self.turns:
            query_BHSC, key_BGSC = rotate(query_BHSC, *rotation), rotate(key_BGSC, *rotation)
        out_BHSC = causal_attention(
            query_BHSC,
            key_BGSC,
            value_BGSC,
            scale=self.spec.head_dim**-0.5,
            local=self.local,
            sinks=None if self.sinks is None else Sinks(self.sinks, self.gradients),
        )
        return out_BHSC.transpose(1, 2).reshape(x_TD.shape[0], -1)

    def _heads(self, x: Tensor) -> Tensor:
        """(T, heads * C) -> (B, heads, S, C)."""
        return x.view(-1, self.seq_len, x.shape[1] // self.spec.head_dim, self.spec.head_dim).transpose(1, 2)


class LatentAttention(Attention):
    """Multi-head latent attention as trained (MLA: DeepSeek-V2, arXiv 2405.04434, equations 37 to 47).

    Keys and values of all heads are expanded from a normalised latent vector; the key's rotary part is one for all.
    """

    def __init__(
        self,
        model: specs.ModelSpec,
        spec: specs.LatentAttention,
        local: specs.LocalAttention | None,
        seq_len: int,
        gradients: WeightGradients,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.spec, self.local, self.seq_len = spec, local, seq_len
        hidden, heads, query_rank, rank = model.hidden_size, spec.num_heads, spec.q_lora_rank, spec.kv_lora_rank
        self.scale = spec.query_key_dim**-0.5 * (spec.yarn.logit_scale if spec.yarn else 1.0)
        if query_rank:
            self.query_down = Linear(hidden, query_rank, gradients, bias=spec.bias, dtype=dtype)
            self.query_norm = RMSNorm(query_rank, model.norm_epsilon, gradients, dtype=dtype)
            self.query_up = Linear(query_rank, heads * spec.query_key_dim, gradients, dtype=dtype)
        else:
            self.query = Linear(hidden, heads * spec.query_key_dim, gradients, dtype=dtype)
        self.latent = Linear(hidden, rank + spec.qk_rope_head_dim, gradients, bias=spec.bias, dtype=dtype)
        self.latent_norm = RMSNorm(rank, model.norm_epsilon, gradients, dtype=dtype)
        self.key_value = Linear(rank, heads * (spec.qk_nope_head_dim + spec.v_head_dim), gradients, dtype=dtype)
        self.output = Linear(heads * spec.v_head_dim, hidden, gradients, bias=spec.bias, dtype=dtype)

    def gathered(self, x_TD: Tensor, rotation: Rotation) -> Tensor:
        """What the heads gather for every token (T, H * V), the input of the output projection."""
        spec = self.spec
        query = self.query_up(self.query_norm(self.query_down(x_TD))) if spec.q_lora_rank else self.query(x_TD)
        query_BHSN, query_BHSP = self._heads(query, spec.qk_nope_head_dim, spec.qk_rope_head_dim)
        latent_TL, shared_TP = self.latent(x_TD).split((spec.kv_lora_rank, spec.qk_rope_head_dim), dim=1)
        key_value = self.key_value(self.latent_norm(latent_TL))
        key_BHSN, value_BHSV = self._heads(key_value, spec.qk_nope_head_dim, spec.v_head_dim)
        shared_B1SP = rotate(shared_TP.view(-1, 1, self.seq_len, spec.qk_rope_head_dim), *rotation)
        out_BHSV = causal_attention(
            torch.cat((query_BHSN, rotate(query_BHSP, *rotation)), dim=-1),
            torch.cat((key_BHSN, shared_B1SP.expand(-1, spec.num_heads, -1, -1)), dim=-1),
            value_BHSV,
            scale=self.scale,
            local=self.local,
        )
        return out_BHSV.transpose(1, 2).reshape(x_TD.shape[0], -1)

    def _heads(self, x: Tensor, first: int, second: int) -> tuple[Tensor, ...]:
        """(T, H * (first + second)) -> (B, H, S, first) and (B, H, S, second)."""
        return x.view(-1, self.seq_len, self.spec.num_heads, first + second).transpose(1, 2).split((first, second), -1)

"""Grouped-query attention with rotary positions and optional query and key norms.

B sequences, S positions, T = B * S tokens, D hidden size, H query heads, G key/value heads, C head dimension
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipermoe.runtime.gradients import WeightGradients
from pipermoe.runtime.linear import Linear
from pipermoe.runtime.norm import RMSNorm
from pipermoe.specs.model import GroupedQueryAttention, ModelSpec


class Attention(nn.Module):
    """Causal self-attention of one layer (GQA: Ainslie et al. 2023; RoPE: Su et al. 2021, half-split form)."""

    def __init__(self, model: ModelSpec, seq_len: int, gradients: WeightGradients, dtype: torch.dtype):
        super().__init__()
        spec, hidden = model.attention, model.hidden_size
        assert isinstance(spec, GroupedQueryAttention)
        self.spec, self.seq_len = spec, seq_len
        query, key_value = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.query = Linear(hidden, query, gradients, bias=spec.qkv_bias, dtype=dtype)
        self.key = Linear(hidden, key_value, gradients, bias=spec.qkv_bias, dtype=dtype)
        self.value = Linear(hidden, key_value, gradients, bias=spec.qkv_bias, dtype=dtype)
        self.output = Linear(query, hidden, gradients, bias=spec.output_bias, dtype=dtype)
        if spec.qk_norm != "none":
            head = spec.qk_norm == "head"
            self.query_norm = RMSNorm(spec.head_dim if head else query, model.norm_epsilon, gradients, dtype=dtype)
            self.key_norm = RMSNorm(spec.head_dim if head else key_value, model.norm_epsilon, gradients, dtype=dtype)

    def forward(self, x_TD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self.query(x_TD), self.key(x_TD), self.value(x_TD)
        if self.spec.qk_norm == "full":
            query, key = self.query_norm(query), self.key_norm(key)
        query_BHSC, key_BGSC, value_BGSC = self._heads(query), self._heads(key), self._heads(value)
        if self.spec.qk_norm == "head":
            query_BHSC, key_BGSC = self.query_norm(query_BHSC), self.key_norm(key_BGSC)
        out_BHSC = F.scaled_dot_product_attention(
            rotate(query_BHSC, *rotation),
            rotate(key_BGSC, *rotation),
            value_BGSC,
            is_causal=True,
            enable_gqa=self.spec.num_heads != self.spec.num_kv_heads,
        )
        return self.output(out_BHSC.transpose(1, 2).reshape(x_TD.shape[0], -1))

    def _heads(self, x: Tensor) -> Tensor:
        """(T, heads * C) -> (B, heads, S, C)."""
        return x.view(-1, self.seq_len, x.shape[1] // self.spec.head_dim, self.spec.head_dim).transpose(1, 2)


def rotation_tables(seq_len: int, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, C) of the rotary angles `position * theta ** (-2i / C)`, each twice."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(seq_len, dtype=torch.float64)[:, None] * frequency.repeat(2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_BHSC: Tensor, cosine_SC: Tensor, sine_SC: Tensor) -> Tensor:
    low, high = x_BHSC.chunk(2, dim=-1)
    return x_BHSC * cosine_SC + torch.cat((-high, low), dim=-1) * sine_SC

"""How many FLOPs a model's forward pass takes, per component. A multiply-add counts as 2."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pipermoe.specs.model import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerFlops:
    """Forward FLOPs of one layer by component; numbers or arrays alike. Backward takes twice as many."""

    attention_projections: Any
    attention_core: Any
    router: Any
    routed_experts: Any
    shared_experts: Any
    dense_mlp: Any

    @property
    def total(self) -> Any:
        return sum(getattr(self, field.name) for field in fields(self))


def layer_forward_flops(model: ModelSpec, layer: int, *, tokens, seq_len, causal: bool, routed_rows=None) -> LayerFlops:
    """Forward FLOPs of `layer` for `tokens` tokens in sequences of `seq_len`.

    `routed_rows` is the number of (token, expert) pairs the experts compute: `tokens * top_k` unless given (a rank's
    own share under imbalance). `causal` halves the attention core; the executed kernel on CPU computes the full square.
    """
    attention, moe, hidden, is_moe = model.attention, model.moe, model.hidden_size, model.is_moe(layer)
    query = attention.num_heads * attention.head_dim
    key_value = attention.num_kv_heads * attention.head_dim
    rows = tokens * moe.top_k if routed_rows is None else routed_rows
    return LayerFlops(
        attention_projections=2 * tokens * hidden * (2 * query + 2 * key_value),
        attention_core=4 * tokens * seq_len * query / (2 if causal else 1),
        router=2 * tokens * hidden * moe.num_experts * is_moe,
        routed_experts=2 * rows * moe.expert_matrices * hidden * moe.expert_width * is_moe,
        shared_experts=2 * tokens * hidden * (moe.expert_matrices * moe.shared_width + moe.shared_gate) * is_moe,
        dense_mlp=2 * tokens * 3 * hidden * model.dense_width * (not is_moe),
    )


def head_forward_flops(model: ModelSpec, tokens) -> Any:
    """The output projection (also when its weight is tied to the embedding)."""
    return 2 * tokens * model.hidden_size * model.vocab_size

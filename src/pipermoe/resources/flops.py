"""How many FLOPs a model's forward pass takes, per component. A multiply-add counts as 2; only products of matrices
are counted (norms, activations and softmax are memory-bound). Every formula is written out in docs/resource-model.md.

Two conventions for the attention core: "full" charges every query all keys of its sequence or of its blocks, "causal"
only those that it may see (what the model needs). The runtime's kernel executes the full one, and on narrower values as
if they were as wide as queries (`modules/attention_core.py`): `LayerFlops` counts that.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import singledispatch
from typing import Any

import numpy as np

from pipermoe.resources.parameters import active_parameters, embedding_parameters
from pipermoe.specs.model import Attention, GroupedQueryAttention, LatentAttention, ModelSpec
from pipermoe.specs.strategy import RecomputeModule


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

    @property
    def input_gradient(self) -> Any:
        """Backward FLOPs that earlier layers wait for: both operands of the attention core are activations."""
        return self.total + self.attention_core

    @property
    def weight_gradient(self) -> Any:
        """Backward FLOPs that a zero-bubble schedule may postpone: one product per weight."""
        return self.total - self.attention_core


def layer_forward_flops(model: ModelSpec, layer: int, *, tokens, seq_len, causal: bool, routed_rows=None) -> LayerFlops:
    """Forward FLOPs of `layer` for `tokens` tokens in sequences of `seq_len`.

    `routed_rows` is the number of (token, expert) pairs the experts compute: `tokens * top_k` unless given (a rank's
    own share under imbalance). `causal` counts what the model needs, visible keys only; otherwise it is what the
    runtime executes, the full square with padded values.
    """
    moe, hidden, is_moe = model.moe, model.hidden_size, model.is_moe(layer)
    rows = tokens * moe.top_k if routed_rows is None else routed_rows
    core = attention_core_flops(model, layer, tokens=tokens, seq_len=seq_len, causal=causal)
    padding = 0 if causal else core_padding_flops(model, layer, tokens=tokens, seq_len=seq_len)
    return LayerFlops(
        attention_projections=attention_projection_flops(model.attention, hidden, tokens),
        attention_core=core + padding,
        router=2 * tokens * hidden * moe.num_experts * is_moe,
        routed_experts=2 * rows * moe.expert_matrices * hidden * moe.expert_width * is_moe,
        shared_experts=2 * tokens * hidden * (moe.expert_matrices * moe.shared_width + moe.shared_gate) * is_moe,
        dense_mlp=2 * tokens * model.dense_matrices * hidden * model.dense_width * (not is_moe),
    )


@singledispatch
def attention_projection_flops(attention: Attention, hidden_size: int, tokens) -> Any:
    """Forward FLOPs of the products with weights in one attention block, for `tokens` tokens."""
    raise TypeError(f"no FLOP count for {type(attention).__name__}")


@attention_projection_flops.register
def _(attention: GroupedQueryAttention, hidden_size: int, tokens) -> Any:
    query = attention.num_heads * attention.head_dim
    key_value = attention.num_kv_heads * attention.head_dim
    return 2 * tokens * hidden_size * (2 * query + 2 * key_value)


@attention_projection_flops.register
def _(attention: LatentAttention, hidden_size: int, tokens) -> Any:
    """As trained: keys and values are expanded for every head (absorbing the up-projection pays in decoding only)."""
    heads, q_rank, indexer = attention.num_heads, attention.q_lora_rank, attention.indexer
    per_token = (
        hidden_size * q_rank
        + (q_rank or hidden_size) * heads * attention.query_key_dim
        + hidden_size * (attention.kv_lora_rank + attention.qk_rope_head_dim)
        + attention.kv_lora_rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        + heads * attention.v_head_dim * hidden_size
    )
    if indexer:
        per_token += q_rank * indexer.num_heads * indexer.head_dim
        per_token += hidden_size * (indexer.head_dim + indexer.num_heads)
    return 2 * tokens * per_token


def attention_core_flops(model: ModelSpec, layer: int, *, tokens, seq_len, causal: bool) -> Any:
    """Scores and weighted values: 2 (d_qk + d_v) FLOPs per head, query and key; an indexer scores all keys first."""
    attention = model.attention
    indexer = attention.indexer if isinstance(attention, LatentAttention) else None
    per_key = 2 * attention.num_heads * (attention.query_key_dim + attention.value_dim)
    core = _pairs(model, layer, tokens, seq_len, causal=causal) * per_key
    if indexer is None:
        return core
    # q.k for every indexer head, then the heads' weighted sum.
    per_key = 2 * indexer.num_heads * (indexer.head_dim + 1)
    return core + tokens * _mean_keys(seq_len, causal=causal) * per_key


def core_padding_flops(model: ModelSpec, layer: int, *, tokens, seq_len) -> Any:
    """What the full core takes more with values as wide as queries: 2 (d_qk - d_v) per head, query and key."""
    attention = model.attention
    missing = attention.query_key_dim - attention.value_dim
    if missing <= 0:
        return 0
    per_key = 2 * attention.num_heads * missing
    return _pairs(model, layer, tokens, seq_len, causal=False) * per_key


def _pairs(model: ModelSpec, layer: int, tokens, seq_len, *, causal: bool) -> Any:
    """(query, key) pairs of `tokens` queries; in this order of operations whole numbers stay whole."""
    if model.is_local(layer) and not causal:
        return tokens * _pairs_in_blocks(model, seq_len) / seq_len
    return tokens * keys_per_query(model, layer, seq_len, causal=causal)


def keys_per_query(model: ModelSpec, layer: int, seq_len, *, causal: bool) -> Any:
    """Mean number of keys that a query of `layer` meets in a sequence of `seq_len` (S); the diagonal counts half.

    Whole sequence: S, causal S / 2. Window of w keys: causal w - w^2 / 2S for w < S. Chunks of c: causal
    (floor(S / c) c^2 + (S mod c)^2) / 2S. Selection of w keys: min(S, w), causal as a window.

    Of windows and chunks a kernel executes blocks of `size` queries: over their own block, and in a window over the
    block before too.
    """
    attention, local = model.attention, model.local_attention
    if local is not None and layer in local.layers:
        if not causal:
            return _pairs_in_blocks(model, seq_len) / seq_len
        if local.kind == "chunked":
            return _pairs_in_chunks(seq_len, local.size) / (2 * seq_len)
        return _mean_keys_in_window(seq_len, local.size, causal=True)
    if isinstance(attention, LatentAttention) and attention.indexer:
        return _mean_keys_in_window(seq_len, attention.indexer.top_k, causal=causal)
    return _mean_keys(seq_len, causal=causal)


def _mean_keys(seq_len, *, causal: bool) -> Any:
    return seq_len / 2 if causal else seq_len


def _mean_keys_in_window(seq_len, window: int, *, causal: bool) -> Any:
    visible = np.minimum(seq_len, window)
    return visible - visible**2 / (2 * seq_len) if causal else visible


def _pairs_in_blocks(model: ModelSpec, seq_len) -> Any:
    """(query, key) pairs of one sequence that a local layer executes."""
    local = model.local_attention
    assert local is not None
    if local.kind == "chunked":
        return _pairs_in_chunks(seq_len, local.size)
    whole, rest = seq_len // local.size, seq_len % local.size
    pairs = (2 * whole - 1) * local.size**2 + rest * (local.size + rest)
    return np.where(seq_len <= local.size, seq_len**2, pairs)


def _pairs_in_chunks(seq_len, chunk: int) -> Any:
    whole, rest = seq_len // chunk, seq_len % chunk
    return whole * chunk**2 + rest**2


def rebuilt_forward_flops(model: ModelSpec, layer: int, modules: Collection[RecomputeModule], **counts: Any) -> Any:
    """Forward FLOPs of `layer` that selective recomputation repeats: each module up to the input of its last product.

    `counts` are those of `layer_forward_flops`. Norms and "moe_act" contain no product.
    """
    moe, hidden, tokens = model.moe, model.hidden_size, counts["tokens"]
    once = layer_forward_flops(model, layer, **counts)
    output = 2 * tokens * model.attention.num_heads * model.attention.value_dim * hidden
    inner, dense_inner = moe.expert_matrices - 1, model.dense_matrices - 1
    shared = 2 * tokens * hidden * inner * moe.shared_width * model.is_moe(layer)
    return (
        ("attention" in modules) * (once.attention_projections - output + once.attention_core)
        + ("experts" in modules) * (once.routed_experts * inner // moe.expert_matrices)
        + ("shared_experts" in modules) * shared
        + ("dense_mlp" in modules) * (once.dense_mlp * dense_inner // model.dense_matrices)
    )


def head_forward_flops(model: ModelSpec, tokens) -> Any:
    """The output projection (also when its weight is tied to the embedding)."""
    return 2 * tokens * model.hidden_size * model.vocab_size


def mtp_forward_flops(model: ModelSpec, *, tokens, seq_len, causal: bool) -> Any:
    """All multi-token prediction modules: an MoE layer behind a 2d -> d projection, and the head once more."""
    layer = layer_forward_flops(model, model.moe_layers[-1], tokens=tokens, seq_len=seq_len, causal=causal).total
    return model.mtp_layers * (layer + join_forward_flops(model, tokens) + head_forward_flops(model, tokens))


def join_forward_flops(model: ModelSpec, tokens) -> Any:
    """The projection of the state and a later token's vector to the input of a multi-token prediction layer."""
    return 4 * tokens * model.hidden_size**2


def model_forward_flops(model: ModelSpec, *, tokens, seq_len, causal: bool) -> Any:
    """Forward FLOPs of the whole model without multi-token prediction; forward and backward together take 3 times."""
    layers = sum(
        layer_forward_flops(model, layer, tokens=tokens, seq_len=seq_len, causal=causal).total
        for layer in range(model.num_layers)
    )
    return layers + head_forward_flops(model, tokens)


def training_forward_flops(model: ModelSpec, *, tokens, seq_len, causal: bool) -> Any:
    """Forward FLOPs of what is trained: the whole model and its multi-token prediction."""
    counts = {"tokens": tokens, "seq_len": seq_len, "causal": causal}
    return model_forward_flops(model, **counts) + mtp_forward_flops(model, **counts)


def six_n_flops_per_token(model: ModelSpec, seq_len) -> Any:
    """The "6N" convention: 6 FLOPs per active parameter but the input embedding, and the full attention core.

    Forward and backward together, per token. Counts norms and biases as if they were products, which
    `model_forward_flops` does not. Sources: PaLM, arXiv 2204.02311, appendix B; torchtitan's FLOPs per token.
    """
    parameters = active_parameters(model) - embedding_parameters(model)
    if model.tie_word_embeddings:
        parameters += embedding_parameters(model)  # the shared weight is a product in the head
    core = sum(
        attention_core_flops(model, layer, tokens=1, seq_len=seq_len, causal=False) for layer in range(model.num_layers)
    )
    return 6 * parameters + 3 * core

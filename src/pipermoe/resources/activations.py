"""The tensors that a block keeps from its forward to its backward, and the moments in which it needs most on top.

They mirror `runtime/stage.py` and the modules it runs, tensor by tensor. All results are bytes for one micro-batch and
broadcast over strategies.

T tokens, K choices a token, A = T * K rows (as many arrive as leave under balanced routing), D = T * hidden_size,
W = A * expert_width, V vocabulary; e bytes of an element. Statistics are fp32, indices int64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipermoe.specs.model import GroupedQueryAttention, LatentAttention, ModelSpec

STATISTIC_BYTES = 4
INDEX_BYTES = 8


@dataclass(frozen=True, slots=True)
class Moment:
    """One instant in the work on a micro-batch: what it has freed of the kept tensors, and what it holds on top."""

    freed: Any
    communication: Any
    temporary: Any

    @property
    def extra(self) -> Any:
        return self.communication + self.temporary - self.freed


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """One layer: bytes kept with and without its graph, and the moments of its backward that can be the peak."""

    kept: Any
    kept_full: Any
    moments: tuple[Moment, ...]
    moments_full: tuple[Moment, ...]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that recur, in bytes: a hidden state D of all tokens, and of all routed rows."""

    model: ModelSpec
    tokens: Any
    element: int

    @property
    def hidden(self) -> Any:
        return self.tokens * self.model.hidden_size * self.element

    @property
    def rows(self) -> Any:
        return self.hidden * self.model.moe.top_k

    def tokens_by(self, width: int) -> Any:
        return self.tokens * width * self.element

    def rows_by(self, width: int) -> Any:
        return self.tokens * self.model.moe.top_k * width * self.element


def attention_kept(sizes: Sizes) -> Any:
    """From x to the norm before the feed-forward block, the core fused: x and its norm, the residual h and its norm."""
    attention = sizes.model.attention
    inside = (
        _latent_kept(sizes, attention) if isinstance(attention, LatentAttention) else _grouped_kept(sizes, attention)
    )
    return 4 * sizes.hidden + 2 * sizes.tokens * STATISTIC_BYTES + inside


def _grouped_kept(sizes: Sizes, attention: GroupedQueryAttention) -> Any:
    """Queries and keys before their norm (if there is one) and after rotation; values; output and log-sum-exp."""
    query, key_value = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    copies = 1 if attention.qk_norm == "none" else 2
    norms = {"none": 0, "head": attention.num_heads + attention.num_kv_heads, "full": 2, "l2": 2}[attention.qk_norm]
    statistics = attention.num_heads + norms
    return (
        sizes.tokens_by((copies + 1) * query + (copies + 1) * key_value) + sizes.tokens * statistics * STATISTIC_BYTES
    )


def _latent_kept(sizes: Sizes, attention: LatentAttention) -> Any:
    """The query's and the key-value's short vectors before and after their norm; the expanded keys and values, of which
    the value part is used; rotated queries and keys of all heads; the output, once by heads as the core writes it and
    once by tokens as the projection reads it; log-sum-exp.
    """
    heads, short_query = attention.num_heads, attention.q_lora_rank
    expanded = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    short = 2 * short_query + 2 * attention.kv_lora_rank + attention.qk_rope_head_dim
    statistics = heads + 1 + (short_query > 0)
    return (
        sizes.tokens_by(short + expanded + 2 * heads * (attention.query_key_dim + attention.v_head_dim))
        + sizes.tokens * statistics * STATISTIC_BYTES
    )


def moe_layer(sizes: Sizes, local_experts) -> BlockMemory:
    """Attention and a mixture of experts, of which a rank holds `local_experts`."""
    moe, hidden, rows, tokens = sizes.model.moe, sizes.hidden, sizes.rows, sizes.tokens
    gate_up, gated = sizes.rows_by(2 * moe.expert_width), sizes.rows_by(moe.expert_width)
    attend = attention_kept(sizes)
    router = tokens * (moe.num_experts + moe.top_k + moe.router.normalize_top_k) * STATISTIC_BYTES
    choices = tokens * moe.top_k * INDEX_BYTES
    weights = tokens * moe.top_k * sizes.element
    travels = local_experts < moe.num_experts
    sorts = travels & (local_experts > 1)  # rows that arrive from several ranks are sorted by expert
    route = (2 + 2 * sorts) * choices
    merge = rows + weights
    shared, shared_graph = (hidden, _shared_graph(sizes)) if moe.shared_width else (0, 0)
    to_shared = hidden if moe.shared_width else 0  # the gradient that waits for that of the routed experts
    exchanged = Moment(merge, 2 * rows * travels, hidden + weights + rows * sorts)
    return BlockMemory(
        kept=attend + router + choices + route + rows + gate_up + gated + merge + shared_graph,
        kept_full=hidden + route + rows + merge + shared,
        moments=(
            Moment(0, 0, hidden + 2 * rows),  # the merge multiplies its gradient by weights and by rows
            exchanged,
            # The gated product's backward: its gradient, the result, silu(gate); the down product's input is free.
            Moment(merge + gated + shared_graph, 0, hidden + to_shared + weights + rows + gate_up + 2 * gated),
        ),
        moments_full=(
            Moment(0, 0, hidden + 3 * rows),
            exchanged,
            Moment(merge + shared, 0, hidden + to_shared + weights + rows + 2 * gate_up + 2 * gated),
            Moment(merge + rows + shared, 0, 5 * hidden + to_shared + weights + attend + router + choices - hidden),
        ),
    )


def _shared_graph(sizes: Sizes) -> Any:
    """Shared experts: gate and up in one tensor, their product, and with an output gate its value and the output."""
    moe = sizes.model.moe
    gated = (sizes.tokens * sizes.element + sizes.hidden) * moe.shared_gate
    return sizes.tokens_by(3 * moe.shared_width) + gated


def dense_layer(sizes: Sizes) -> BlockMemory:
    """Attention and a gated MLP, one piece."""
    attend, width = attention_kept(sizes), sizes.model.dense_width
    gate_up, gated = sizes.tokens_by(2 * width), sizes.tokens_by(width)
    backward = sizes.hidden + gate_up + 2 * gated
    rebuilt = attend - sizes.hidden + gate_up + gated
    return BlockMemory(
        kept=attend + gate_up + gated,
        kept_full=sizes.hidden,
        moments=(Moment(gated, 0, backward),),
        moments_full=(Moment(0, 0, rebuilt - gated + backward),),
    )


def head_kept(sizes: Sizes) -> Any:
    """x and its norm, the logits (overwritten by their gradient), log-sum-exp and targets."""
    statistics = 2 * STATISTIC_BYTES + INDEX_BYTES
    return 2 * sizes.hidden + sizes.tokens_by(sizes.model.vocab_size) + sizes.tokens * statistics

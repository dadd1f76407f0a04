"""What attention keeps: from x to the norm before the feed-forward block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipermoe.resources.activations.sizes import STATISTIC_BYTES, Recompute, Sizes
from pipermoe.specs.model import GroupedQueryAttention, LatentAttention


@dataclass(frozen=True, slots=True)
class AttentionMemory:
    """`whole` is every tensor of the block, `kept` what recomputation leaves of it, `deferred` what its weight
    gradients read: the inputs of its products and the gradients of their outputs.
    """

    whole: Any
    kept: Any
    deferred: Any


def attention_memory(sizes: Sizes, recompute: Recompute) -> AttentionMemory:
    """x and its norm, the block inside, the residual h and its norm."""
    attention = sizes.model.attention
    latent = isinstance(attention, LatentAttention)
    inside = _latent_kept(sizes, attention) if latent else _grouped_kept(sizes, attention)
    inside = inside + _scores(sizes)
    deferred = _latent_deferred(sizes, attention) if latent else _grouped_deferred(sizes, attention)
    statistics = 2 * sizes.stream * STATISTIC_BYTES
    kept = 4 * sizes.hidden + statistics - 2 * sizes.hidden * recompute.norm + inside * (1 - recompute.attention)
    return AttentionMemory(4 * sizes.hidden + statistics + inside, kept, deferred)


def _scores(sizes: Sizes) -> Any:
    """Without a fused core: scores' probabilities, before and after dropout or masking, of every query and key.

    Korthikanti et al., arXiv 2205.05198, section 4.1 (their 5 a s / h counts a dropout mask of one byte as well).
    """
    heads = sizes.model.attention.num_heads
    return 2 * sizes.tokens_by(heads * sizes.seq_len) * sizes.profile.materialised_attention


def _grouped_kept(sizes: Sizes, attention: GroupedQueryAttention) -> Any:
    """Queries and keys before their norm (if there is one) and after rotation; values; output and log-sum-exp."""
    query, key_value = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    copies = 1 if attention.qk_norm == "none" else 2
    norms = {"none": 0, "head": attention.num_heads + attention.num_kv_heads, "full": 2, "l2": 2}[attention.qk_norm]
    statistics = attention.num_heads + norms
    return (
        sizes.tokens_by((copies + 1) * query + (copies + 1) * key_value)
        + sizes.tokens * statistics * STATISTIC_BYTES / sizes.tp
    )


def _grouped_deferred(sizes: Sizes, attention: GroupedQueryAttention) -> Any:
    """The normalised input and the three gradients behind it; the core's output and the gradient of the block's."""
    query, key_value = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    return 2 * sizes.hidden + sizes.tokens_by(2 * query + 2 * key_value)


def _latent_kept(sizes: Sizes, attention: LatentAttention) -> Any:
    """The query's and the key-value's short vectors before and after their norm; the expanded keys and values, of which
    the value part is used; rotated queries and keys of all heads; the output, once by heads as the core writes it and
    once by tokens as the projection reads it; log-sum-exp.
    """
    heads, short_query = attention.num_heads, attention.q_lora_rank
    expanded = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    short = 2 * short_query + 2 * attention.kv_lora_rank + attention.qk_rope_head_dim
    statistics = sizes.tokens * heads / sizes.tp + sizes.stream * (1 + (short_query > 0))
    return (
        sizes.stream_by(short)
        + sizes.tokens_by(expanded + 2 * heads * (attention.query_key_dim + attention.v_head_dim))
        + statistics * STATISTIC_BYTES
    )


def _latent_deferred(sizes: Sizes, attention: LatentAttention) -> Any:
    """As for grouped queries; the short vectors are inputs of the second products and outputs of the first."""
    heads, short_query = attention.num_heads, attention.q_lora_rank
    short = 2 * short_query + 2 * attention.kv_lora_rank + attention.qk_rope_head_dim
    query = heads * attention.query_key_dim
    expanded = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    return 2 * sizes.hidden + sizes.stream_by(short) + sizes.tokens_by(query + expanded + heads * attention.v_head_dim)

"""Attention as a script: from x to the norm before the feed-forward block, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pipermoe.resources.activations.ledger import Ledger
from pipermoe.resources.activations.sizes import STATISTIC_BYTES, Recompute, Sizes
from pipermoe.specs.model import Attention, GroupedQueryAttention, LatentAttention


@dataclass(frozen=True, slots=True)
class AttentionTensors:
    """`inside` lies between the norm and the output projection, `read` of it is read by weight gradients, as are
    `written`, the gradients of the products' outputs. `by_core` is what of it a fused core keeps alone: its operands,
    and its output by heads if another one is read. `core` are the gradients of the core's output and operands.
    `forward` and `backward` are what the core makes for a moment, 0 if it is fused.
    """

    inside: Any
    read: Any
    written: Any
    by_core: Any
    core: Any
    forward: Any = 0
    backward: Any = 0


def attention_tensors(sizes: Sizes) -> AttentionTensors:
    """Of either kind, and of either core."""
    attention = sizes.model.attention
    found = _latent(sizes, attention) if isinstance(attention, LatentAttention) else _grouped(sizes, attention)
    found = replace(found, inside=found.inside + _windows(sizes, attention))
    return _materialised(sizes, found) if sizes.profile.materialised_attention else found


def _materialised(sizes: Sizes, fused: AttentionTensors) -> AttentionTensors:
    """Without a fused core torch works in fp32. It keeps the probabilities of every query and key instead of their
    log-sum-exp, and its operands: queries, keys and values of every query head, beside which those that it was given
    last as long as the forward. Where values are a part of the expanded
    ones and in order, as those of one sequence in fp32 are, it keeps all of these in their place.
    """
    attention = sizes.model.attention
    by_heads = sizes.tokens * attention.num_heads / sizes.tp * STATISTIC_BYTES
    values, scores = by_heads * _core_width(attention), by_heads * sizes.seq_len
    operands = by_heads * 2 * attention.query_key_dim + values
    if isinstance(attention, LatentAttention) and _core_width(attention) == attention.v_head_dim:
        viewed = (sizes.tokens * sizes.cp <= sizes.seq_len) & (sizes.element == STATISTIC_BYTES)
        operands = operands + viewed * by_heads * attention.qk_nope_head_dim
    inside = fused.inside - fused.by_core + operands + scores - by_heads
    return replace(fused, inside=inside, forward=scores + fused.by_core, backward=2 * (scores + values))


def _core_width(attention: Attention) -> int:
    """Of the values that the core is given: narrower ones than queries are padded."""
    return max(attention.value_dim, attention.query_key_dim)


def _windows(sizes: Sizes, attention: Attention) -> Any:
    """What local attention adds, the mean over all layers: blocks' outputs are put together once more, and a sliding
    block has a mask of its queries and the keys of two blocks (`modules/attention_core.py`).
    """
    local = sizes.model.local_attention
    if local is None or sizes.seq_len <= local.size:
        return 0
    value = attention.v_head_dim if isinstance(attention, LatentAttention) else attention.head_dim
    beyond = sizes.seq_len - local.size  # queries of all blocks but the first
    short = sizes.seq_len % local.size
    masks = (beyond * 2 * local.size - short * (local.size - short)) * (local.kind == "sliding") * sizes.element
    share = sum(map(sizes.model.is_local, range(sizes.model.num_layers))) / sizes.model.num_layers
    return share * (sizes.tokens_by(attention.num_heads * value) + masks)


def _grouped(sizes: Sizes, attention: GroupedQueryAttention) -> AttentionTensors:
    """Queries and keys before their norm (if there is one) and after rotation; values; output and log-sum-exp."""
    query, key_value = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    copies = 1 if attention.qk_norm == "none" else 2
    norms = {"none": 0, "head": attention.num_heads + attention.num_kv_heads, "full": 2, "l2": 2}[attention.qk_norm]
    statistics = sizes.tokens * (attention.num_heads + norms) * STATISTIC_BYTES / sizes.tp
    return AttentionTensors(
        inside=sizes.tokens_by((copies + 1) * query + (copies + 1) * key_value) + statistics,
        read=sizes.tokens_by(query),
        written=sizes.tokens_by(query + 2 * key_value),
        by_core=sizes.tokens_by(query + 2 * key_value),
        core=sizes.tokens_by(2 * query + 2 * key_value),
    )


def _latent(sizes: Sizes, attention: LatentAttention) -> AttentionTensors:
    """The query's and the key-value's short vectors before and after their norm; the expanded keys and values, of which
    the value part is used; rotated queries and keys of all heads; the output, once by heads as the core writes it and
    once by tokens as the projection reads it; log-sum-exp. Short vectors are inputs of the second products and outputs
    of the first. Narrower values than queries are padded: then the core's values and output are as wide as queries, and
    the expanded ones are used no more.
    """
    heads, short_query = attention.num_heads, attention.q_lora_rank
    query, value = heads * attention.query_key_dim, heads * attention.v_head_dim
    expanded = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    width = heads * _core_width(attention)  # of the core's values and output
    by_core = 2 * query + (expanded if width == value else width) + width
    read = short_query + attention.kv_lora_rank
    short = 2 * read + attention.qk_rope_head_dim
    statistics = sizes.tokens * heads / sizes.tp + sizes.stream * (1 + (short_query > 0))
    return AttentionTensors(
        inside=sizes.stream_by(short) + sizes.tokens_by(by_core + value) + statistics * STATISTIC_BYTES,
        read=sizes.stream_by(read) + sizes.tokens_by(value),
        written=sizes.stream_by(short - read) + sizes.tokens_by(query + expanded),
        by_core=sizes.tokens_by(by_core),
        core=sizes.tokens_by(2 * query + 2 * width),
    )


def attention_matrices(sizes: Sizes) -> tuple[Any, ...]:
    """Elements of the largest weights."""
    attention, hidden = sizes.model.attention, sizes.model.hidden_size
    heads = attention.num_heads / sizes.tp
    if not isinstance(attention, LatentAttention):
        return (hidden * heads * attention.head_dim,)
    query, latent = attention.q_lora_rank, attention.kv_lora_rank
    return (
        hidden * query,
        (query or hidden) * heads * attention.query_key_dim,
        hidden * (latent + attention.qk_rope_head_dim),
        latent * heads * (attention.qk_nope_head_dim + attention.v_head_dim),
        hidden * heads * attention.v_head_dim,
    )


def attend(work: Ledger, sizes: Sizes, recompute: Recompute) -> None:
    """From x in hand to the residual h and its norm, both in hand beside what is kept."""
    hidden, statistics = sizes.hidden, sizes.stream * STATISTIC_BYTES
    tensors, drops_norm = attention_tensors(sizes), recompute.norm | recompute.full
    inside = tensors.inside
    normalise(work, sizes)
    work.take(inside)
    work.brief(tensors.forward)
    work.take(hidden)  # the output
    work.drop(inside * (recompute.attention | recompute.full), (hidden + statistics) * drops_norm)
    work.take(hidden)  # h
    work.drop(hidden)
    normalise(work, sizes)
    work.drop(statistics * drops_norm)


def attend_backward(work: Ledger, sizes: Sizes, recompute: Recompute) -> None:
    """From the gradient of h in hand to that of x; all that attention kept, x included, is gone then."""
    hidden, tensors, dropped = sizes.hidden, attention_tensors(sizes), recompute.attention | recompute.full
    renormalise(work, sizes, recompute)
    work.take(tensors.inside * recompute.attention)
    work.brief(tensors.backward)
    work.take(tensors.core)
    work.free(tensors.inside - tensors.read, dropped)
    work.release_kept(tensors.read, dropped)
    work.drop(tensors.core)
    work.take(tensors.written)
    work.take(hidden)
    work.brief(2 * hidden)  # three projections' gradients of one input: the sum, the next one, and the sum of both
    work.release(tensors.written)
    drops_norm = recompute.norm | recompute.full
    work.release_kept(hidden, drops_norm)
    normalise_backward(work, sizes)
    work.free(sizes.stream * STATISTIC_BYTES, drops_norm)
    work.drop(hidden)
    work.take(hidden)  # the sum of both ways
    work.drop(hidden)
    work.release(hidden)  # the gradient of h, which is that of the output
    work.drop(hidden, of="activations")


def normalise(work: Ledger, sizes: Sizes) -> None:
    """A norm of the residual stream: the result and its statistics; beside them it works in fp32."""
    work.brief(_exact(sizes), sizes.exact_hidden)
    work.take(sizes.hidden, sizes.stream * STATISTIC_BYTES)
    work.brief(_exact(sizes), _exact(sizes))


def renormalise(work: Ledger, sizes: Sizes, recompute: Recompute) -> None:
    """The same once more, where it was dropped and nothing larger is rebuilt."""
    work.brief(_exact(sizes) * recompute.norm, sizes.exact_hidden * recompute.norm)
    work.take((sizes.hidden + sizes.stream * STATISTIC_BYTES) * recompute.norm)


def normalise_backward(work: Ledger, sizes: Sizes) -> None:
    """From the gradient of a norm's result in hand to that of its input, also in hand; input and statistics go."""
    exact = sizes.exact_hidden
    work.take(exact, _exact(sizes))  # the normal values; the gradient in fp32
    work.brief(exact)
    work.take(exact)
    work.brief(exact)
    work.drop(exact, _exact(sizes))
    work.drop(exact - sizes.hidden)  # rounded


def _exact(sizes: Sizes) -> Any:
    """A copy of the residual stream in fp32, where it is not in fp32 already."""
    return sizes.exact_hidden * (sizes.element < STATISTIC_BYTES)

"""Softmax attention of queries, keys and values: causal, over windows or chunks, with or without sinks.

B sequences, H query heads, G key/value heads, S positions, Q queries of a block, K its keys, C query and key dimension,
V value dimension
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipermoe.modules.sinks import SinkAttention, Sinks
from pipermoe.specs.model import LocalAttention


def causal_attention(
    query_BHSC: Tensor,
    key_BGSC: Tensor,
    value_BGSV: Tensor,
    *,
    scale: float,
    local: LocalAttention | None = None,
    sinks: Sinks | None = None,
) -> Tensor:
    """What every query gathers from the positions up to its own (B, H, S, V).

    Local attention goes block by block of `local.size` queries, each over its own block and, sliding, the one before:
    work and memory grow with the window instead of the sequence. `sinks` add exp(sink) to every denominator.

    torch's fused kernels, on CPUs and FlashAttention, want values as wide as queries: latent attention's narrower ones
    are filled up with zeros. Without them the scores of all queries and keys would be kept: at DeepSeek's widths
    forward and backward of 2,048 tokens take 2 to 3 times as long.
    """
    width, missing = value_BGSV.shape[3], query_BHSC.shape[3] - value_BGSV.shape[3]
    if missing > 0:
        value_BGSC = F.pad(value_BGSV, (0, missing))
        return causal_attention(query_BHSC, key_BGSC, value_BGSC, scale=scale, local=local, sinks=sinks)[..., :width]
    seq_len = query_BHSC.shape[2]
    if local is None or seq_len <= local.size:
        return _attend(query_BHSC, key_BGSC, value_BGSV, None, scale, sinks)
    outputs, size = [], local.size
    for start in range(0, seq_len, size):
        stop, before = min(start + size, seq_len), size if local.kind == "sliding" and start else 0
        keys = slice(start - before, stop)
        seen_QK = _band(stop - start, size, query_BHSC) if before else None
        block = (query_BHSC[:, :, start:stop], key_BGSC[:, :, keys], value_BGSV[:, :, keys])
        outputs.append(_attend(*block, seen_QK, scale, sinks))
    return torch.cat(outputs, dim=2)


def _band(queries: int, size: int, like: Tensor) -> Tensor:
    """0 where query q sees key k of a block and the one before (q < k <= q + size), minus infinity elsewhere."""
    hidden_QK = (
        torch.ones(queries, size + queries, dtype=torch.bool, device=like.device).tril(size).triu(1).logical_not()
    )
    return torch.zeros(hidden_QK.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden_QK, float("-inf"))


def _attend(
    query_BHQC: Tensor,
    key_BGKC: Tensor,
    value_BGKV: Tensor,
    seen_QK: Tensor | None,
    scale: float,
    sinks: Sinks | None,
) -> Tensor:
    """One block: `seen_QK` is added to the logits; without it the block is square and causal."""
    if sinks is not None:
        return SinkAttention.apply(query_BHQC, key_BGKC, value_BGKV, seen_QK, scale, sinks)
    return F.scaled_dot_product_attention(
        query_BHQC,
        key_BGKC,
        value_BGKV,
        attn_mask=seen_QK,
        is_causal=seen_QK is None,
        scale=scale,
        enable_gqa=query_BHQC.shape[1] != key_BGKC.shape[1],
    )

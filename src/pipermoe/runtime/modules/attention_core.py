"""Softmax attention of queries, keys and values: causal, over windows or chunks, with or without sinks.

B sequences, H query heads, G key/value heads, S positions, Q queries of a block, K its keys, C query and key dimension,
V value dimension
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipermoe.runtime.pipeline.gradients import WeightGradients, accumulate
from pipermoe.specs.model import LocalAttention

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Sinks:
    """One logit per head (H) that leads to no value, a parameter, and where its gradient goes."""

    logits_H: nn.Parameter
    gradients: WeightGradients


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
    """
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
        return _SinkAttention.apply(query_BHQC, key_BGKC, value_BGKV, seen_QK, scale, sinks)
    return F.scaled_dot_product_attention(
        query_BHQC,
        key_BGKC,
        value_BGKV,
        attn_mask=seen_QK,
        is_causal=seen_QK is None,
        scale=scale,
        enable_gqa=query_BHQC.shape[1] != key_BGKC.shape[1],
    )


class _SinkAttention(torch.autograd.Function):
    """Attention whose softmax has one more logit per head, a parameter, that leads to no value (gpt-oss).

    The fused kernel gives output and log-sum-exp L without the sink s. With it the probabilities are exp(logit - L'),
    L' = log(exp L + exp s), and the output shrinks by exp(L - L'). As the kernel's backward needs only the output and
    the log-sum-exp, handing it the new ones gives the gradients with sink; that of s is -exp(s - L') grad . output.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float, sinks: Sinks
    ) -> Tensor:
        out_BHQV, total_BHQ = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, seen is None, attn_mask=seen, scale=scale
        )
        with_sink_BHQ = torch.logaddexp(total_BHQ, sinks.logits_H.detach().float()[:, None])
        out_BHQV = out_BHQV * (total_BHQ - with_sink_BHQ).exp_()[..., None].to(out_BHQV.dtype)
        ctx.save_for_backward(query, key, value, out_BHQV, with_sink_BHQ, seen)
        ctx.scale, ctx.sinks = scale, sinks
        return out_BHQV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total_BHQ, seen = ctx.saved_tensors
        sinks = ctx.sinks
        share_BHQ = (sinks.logits_H.detach().float()[:, None] - total_BHQ).exp_()
        through_BHQ = (gradient * out).sum(-1, dtype=torch.float32)
        to_sinks_H = -(share_BHQ * through_BHQ).sum((0, 2))
        sinks.gradients.add(lambda: accumulate(sinks.logits_H, to_sinks_H))
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient.contiguous(), query, key, value, out, total_BHQ, 0.0, seen is None, attn_mask=seen, scale=ctx.scale
        )
        return *gradients, None, None, None

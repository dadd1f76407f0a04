"""Attention whose softmax has one more logit per head, a parameter, that leads to no value (gpt-oss).

B sequences, H query heads, G key/value heads, Q queries of a block, K its keys, C query and key dimension, V value
dimension
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipermoe.modules.weight_gradients import WeightGradients, accumulate

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Sinks:
    """One logit per head (H) that leads to no value, a parameter, and where its gradient goes."""

    logits_H: nn.Parameter
    gradients: WeightGradients


class SinkAttention(torch.autograd.Function):
    """`seen_QK` is added to the logits; without it the block is square and causal.

    Attention gives output and log-sum-exp L without the sink s. With it the probabilities are exp(logit - L'),
    L' = log(exp L + exp s), and the output shrinks by exp(L - L'). As attention's backward needs only the output and
    the log-sum-exp, handing it the new ones gives the gradients with sink; that of s is -exp(s - L') grad . output.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float, sinks: Sinks
    ) -> Tensor:
        attend = _kernel if query.device.type == "cpu" else plain_forward
        out_BHQV, total_BHQ = attend(query, key, value, seen, scale)
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
        attend_backward = _kernel_backward if query.device.type == "cpu" else plain_backward
        gradients = attend_backward(gradient.contiguous(), query, key, value, out, total_BHQ, seen, ctx.scale)
        return *gradients, None, None, None


def _kernel(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, seen is None, attn_mask=seen, scale=scale
    )


def _kernel_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    seen: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, out, total, 0.0, seen is None, attn_mask=seen, scale=scale
    )


def plain_forward(
    query_BHQC: Tensor, key_BGKC: Tensor, value_BGKV: Tensor, seen_QK: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (B, H, Q, V) and log-sum-exp (B, H, Q) fp32 by plain products: the CPU's kernel in words, any device.

    No kernel for other devices promises the log-sum-exp of every precision, so memory grows with Q * K there.
    """
    logits_BHQK = _logits(query_BHQC, key_BGKC, seen_QK, scale)
    total_BHQ = logits_BHQK.logsumexp(-1)
    shares_BHQK = logits_BHQK.sub_(total_BHQ[..., None]).exp_().to(query_BHQC.dtype)
    return shares_BHQK @ _per_query_head(value_BGKV, query_BHQC), total_BHQ


def plain_backward(
    gradient_BHQV: Tensor,
    query_BHQC: Tensor,
    key_BGKC: Tensor,
    value_BGKV: Tensor,
    out_BHQV: Tensor,
    total_BHQ: Tensor,
    seen_QK: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from the output and the log-sum-exp (Dao et al. 2022, appendix B.2)."""
    key_BHKC, value_BHKV = (_per_query_head(each, query_BHQC) for each in (key_BGKC, value_BGKV))
    shares_BHQK = _logits(query_BHQC, key_BGKC, seen_QK, scale).sub_(total_BHQ[..., None]).exp_()
    through_BHQ1 = (gradient_BHQV * out_BHQV).sum(-1, keepdim=True, dtype=torch.float32)
    to_logits_BHQK = (gradient_BHQV @ value_BHKV.mT).float().sub_(through_BHQ1).mul_(shares_BHQK).mul_(scale)
    to_logits_BHQK, shares_BHQK = to_logits_BHQK.to(query_BHQC.dtype), shares_BHQK.to(query_BHQC.dtype)
    to_key_BHKC, to_value_BHKV = to_logits_BHQK.mT @ query_BHQC, shares_BHQK.mT @ gradient_BHQV
    groups = key_BGKC.shape[1]
    return (
        to_logits_BHQK @ key_BHKC,
        to_key_BHKC.unflatten(1, (groups, -1)).sum(2),
        to_value_BHKV.unflatten(1, (groups, -1)).sum(2),
    )


def _logits(query_BHQC: Tensor, key_BGKC: Tensor, seen_QK: Tensor | None, scale: float) -> Tensor:
    logits_BHQK = (query_BHQC @ _per_query_head(key_BGKC, query_BHQC).mT).float().mul_(scale)
    if seen_QK is not None:
        return logits_BHQK.add_(seen_QK)
    hidden_QK = torch.ones(logits_BHQK.shape[-2:], dtype=torch.bool, device=logits_BHQK.device).triu(1)
    return logits_BHQK.masked_fill_(hidden_QK, float("-inf"))


def _per_query_head(x_BGKC: Tensor, query_BHQC: Tensor) -> Tensor:
    """Every key/value head once for each query head that reads it."""
    return x_BGKC.repeat_interleave(query_BHQC.shape[1] // x_BGKC.shape[1], dim=1)

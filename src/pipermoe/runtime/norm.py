"""RMSNorm (Zhang and Sennrich 2019) that keeps its input and one number a row for backward.

... any leading dimensions, D normalised dimension
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipermoe.runtime.gradients import WeightGradients, accumulate


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * weight_D` over the last dimension, computed in fp32."""

    def __init__(self, size: int, epsilon: float, gradients: WeightGradients, *, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.epsilon = epsilon
        self.gradients = gradients

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: RMSNorm) -> Tensor:
        exact = x.float()
        inverse = exact.square().mean(-1, keepdim=True).add_(layer.epsilon).rsqrt_()
        ctx.save_for_backward(x, inverse)
        ctx.layer = layer
        return (exact * inverse).mul_(layer.weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x, inverse), layer = ctx.saved_tensors, ctx.layer
        normal, gradient = x.float() * inverse, gradient.float()
        # A sum of one product: queueing it would keep two tensors alive to save next to nothing.
        accumulate(layer.weight, (gradient * normal).flatten(0, -2).sum(0))
        scaled = gradient * layer.weight
        mean = (scaled * normal).mean(-1, keepdim=True)
        return scaled.sub_(normal.mul_(mean)).mul_(inverse).to(x.dtype), None

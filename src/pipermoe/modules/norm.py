"""RMSNorm (Zhang and Sennrich 2019) that keeps its input and one number a row for backward; LayerNorm that keeps two.

... any leading dimensions, D normalised dimension
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipermoe.modules.weight_gradients import WeightGradients, accumulate
from pipermoe.specs.model import ModelSpec


def build_norm(model: ModelSpec, gradients: WeightGradients, dtype: torch.dtype) -> RMSNorm | LayerNorm:
    """A norm over the hidden size, of the kind that the model has."""
    kind = LayerNorm if model.norm_bias else RMSNorm
    return kind(model.hidden_size, model.norm_epsilon, gradients, dtype=dtype)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + epsilon) * weight_D` over the last dimension, computed in fp32."""

    def __init__(self, size: int, epsilon: float, gradients: WeightGradients, *, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.epsilon = epsilon
        self.gradients = gradients

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self)


def unit_rms(x: Tensor, epsilon: float) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon)` over the last dimension, without weights."""
    exact = x.float()
    return (exact * exact.square().mean(-1, keepdim=True).add(epsilon).rsqrt()).to(x.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm, and `1 / sqrt(mean(x^2) + epsilon)` of every row for its backward."""
    exact = x.float()
    inverse = exact.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return (exact * inverse).mul_(weight_D).to(x.dtype), inverse


def rms_norm_gradients(gradient: Tensor, x: Tensor, inverse: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and of the weights (D,)."""
    normal, gradient = x.float() * inverse, gradient.float()
    to_weight = (gradient * normal).flatten(0, -2).sum(0)
    scaled = gradient * weight_D
    mean = (scaled * normal).mean(-1, keepdim=True)
    return scaled.sub_(normal.mul_(mean)).mul_(inverse).to(x.dtype), to_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: RMSNorm) -> Tensor:
        result, inverse = rms_norm(x, layer.weight, layer.epsilon)
        ctx.save_for_backward(x, inverse)
        ctx.layer = layer
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x, inverse), layer = ctx.saved_tensors, ctx.layer
        to_x, to_weight = rms_norm_gradients(gradient, x, inverse, layer.weight)
        # Summed at once, added later: queueing the sum would keep two tensors alive to save next to nothing.
        layer.gradients.add(lambda: accumulate(layer.weight, to_weight))
        return to_x, None


class LayerNorm(nn.Module):
    """`(x - mean(x)) / sqrt(var(x) + epsilon) * weight_D + bias_D` over the last dimension (Ba et al. 2016)."""

    def __init__(self, size: int, epsilon: float, gradients: WeightGradients, *, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype))
        self.epsilon = epsilon
        self.gradients = gradients

    def forward(self, x: Tensor) -> Tensor:
        return _LayerNorm.apply(x, self)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: LayerNorm) -> Tensor:
        y, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.epsilon)
        ctx.save_for_backward(x, mean, inverse)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x, mean, inverse), layer = ctx.saved_tensors, ctx.layer
        to_x, to_weight, to_bias = torch.ops.aten.native_layer_norm_backward(
            gradient.contiguous(), x, x.shape[-1:], mean, inverse, layer.weight, layer.bias, [True, True, True]
        )
        layer.gradients.add(lambda: accumulate(layer.weight, to_weight))
        layer.gradients.add(lambda: accumulate(layer.bias, to_bias))
        return to_x, None

"""Feed-forward blocks, dense, shared and routed: gated (SwiGLU), clamped as in gpt-oss, or plain (ReLU).

T tokens, R rows sorted by expert, D hidden size, F width
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipermoe.modules.linear import GroupedLinear, Linear
from pipermoe.modules.rebuild import rebuilding
from pipermoe.modules.weight_gradients import WeightGradients
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import RecomputeModule

CLAMPED_GAIN = 1.702  # sigmoid(1.702 x) approximates the normal distribution function (GELU, arXiv 1606.08415)


class FeedForward(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020), gate and up in one product; with 2 matrices `down(relu(up(x)))`.

    With `output_gate` the result is scaled by sigmoid(x w). With `drop` what lies inside is rebuilt in backward.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        gradients: WeightGradients,
        dtype: torch.dtype,
        *,
        matrices: int = 3,
        bias: bool = False,
        output_gate: bool = False,
        drop: bool = False,
    ):
        super().__init__()
        if matrices == 3:
            self.gate_up = Linear(hidden, 2 * width, gradients, bias=bias, dtype=dtype)
        else:
            self.up = Linear(hidden, width, gradients, bias=bias, dtype=dtype)
        self.down = Linear(width, hidden, gradients, bias=bias, dtype=dtype)
        self.gate = Linear(hidden, 1, gradients, dtype=dtype) if output_gate else None
        self.gated, self.drop = matrices == 3, drop

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = rebuilding(self.drop, self._inside, self.down, x_TD)
        return y_TD if self.gate is None else self.gate(x_TD).sigmoid() * y_TD

    def _inside(self, x_TD: Tensor) -> Tensor:
        return swiglu(self.gate_up(x_TD)) if self.gated else self.up(x_TD).relu_()


class Experts(nn.Module):
    """The routed experts that one rank holds, a feed-forward block each, over rows sorted by expert.

    `drops` names what is rebuilt in backward: "moe_act" their activation product, "experts" all that lies inside.
    """

    def __init__(
        self,
        model: ModelSpec,
        experts: int,
        gradients: WeightGradients,
        dtype: torch.dtype,
        drops: Collection[RecomputeModule] = (),
    ):
        super().__init__()
        self.model, self.gradients, self.dtype, self.drops = model, gradients, dtype, drops
        moe, hidden = model.moe, model.hidden_size
        self.gated, self.limit = moe.expert_matrices == 3, moe.swiglu_limit
        self.drops_all, self.drops_product = "experts" in drops, "moe_act" in drops
        if self.gated:
            self.gate_up = GroupedLinear(
                experts, hidden, 2 * moe.expert_width, gradients, bias=moe.expert_bias, dtype=dtype
            )
        else:
            self.up = GroupedLinear(experts, hidden, moe.expert_width, gradients, bias=moe.expert_bias, dtype=dtype)
        self.down = GroupedLinear(experts, moe.expert_width, hidden, gradients, bias=moe.expert_bias, dtype=dtype)

    def of_the_same_kind(self, experts: int) -> Experts:
        """So many experts like these, on the same device, with weights of their own, as yet of any value."""
        with self.down.weight.device:
            made = Experts(self.model, experts, self.gradients, self.dtype, self.drops)
        for ours, theirs in zip(self.parameters(), made.parameters(), strict=True):
            theirs.grad_dtype = ours.grad_dtype
        return made

    def forward(self, x_RD: Tensor, rows: list[int]) -> Tensor:
        def first(x_RD: Tensor) -> Tensor:
            return self.gate_up(x_RD, rows) if self.gated else self.up(x_RD, rows)

        def down(product_RF: Tensor) -> Tensor:
            return self.down(product_RF, rows)

        if self.drops_all:
            return rebuilding(True, lambda x_RD: self._activation(first(x_RD)), down, x_RD)
        return rebuilding(self.drops_product, self._activation, down, first(x_RD))

    def _activation(self, first: Tensor) -> Tensor:
        if not self.gated:
            return first.relu() if self.drops_product else first.relu_()
        return clamped_swiglu(first, self.limit) if self.limit else swiglu(first)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of (..., 2F) -> (..., F), keeping only its input for backward."""
    return _SwiGLU.apply(gate_up)


def clamped_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """`(up + 1) * gate * sigmoid(1.702 gate)` of (..., 2F) -> (..., F), gate at most and up within `limit` (gpt-oss).

    Keeps only its input for backward.
    """
    return _ClampedSwiGLU.apply(gate_up, limit)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_product(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return swiglu_gradient(gradient, *ctx.saved_tensors)


def swiglu_product(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_gradient(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of `gate_up` from that of the product."""
    gate, up = gate_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_up)
    to_gate, to_up = result.chunk(2, dim=-1)
    torch.mul(gradient, F.silu(gate), out=to_up)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=to_gate)
    return result


class _ClampedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.limit = limit
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate.clamp(max=limit)
        return (gate * CLAMPED_GAIN).sigmoid_().mul_(gate).mul_(up.clamp(-limit, limit).add_(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (gate_up,), limit = ctx.saved_tensors, ctx.limit
        gate, up = gate_up.chunk(2, dim=-1)
        clamped = gate.clamp(max=limit)
        bell = (clamped * CLAMPED_GAIN).sigmoid_()
        slope = bell * (1 + CLAMPED_GAIN * clamped * (1 - bell))
        result = torch.empty_like(gate_up)
        to_gate, to_up = result.chunk(2, dim=-1)
        torch.mul(gradient * slope, up.clamp(-limit, limit).add_(1), out=to_gate)
        torch.mul(gradient * bell, clamped, out=to_up)
        to_gate.mul_(gate <= limit)
        to_up.mul_(up.abs() <= limit)
        return result, None

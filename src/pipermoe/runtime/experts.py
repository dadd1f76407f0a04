"""Feed-forward blocks: gated (SwiGLU) multilayer perceptrons, dense, shared and routed.

T tokens, R rows sorted by expert, D hidden size, F width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipermoe.runtime.gradients import WeightGradients
from pipermoe.runtime.linear import GroupedLinear, Linear


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer 2020), gate and up in one product; optionally scaled by sigmoid(x w)."""

    def __init__(
        self, hidden: int, width: int, gradients: WeightGradients, dtype: torch.dtype, *, output_gate: bool = False
    ):
        super().__init__()
        self.gate_up = Linear(hidden, 2 * width, gradients, dtype=dtype)
        self.down = Linear(width, hidden, gradients, dtype=dtype)
        self.gate = Linear(hidden, 1, gradients, dtype=dtype) if output_gate else None

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.down(swiglu(self.gate_up(x_TD)))
        return y_TD if self.gate is None else self.gate(x_TD).sigmoid() * y_TD


class Experts(nn.Module):
    """The routed experts that one rank holds: a gated MLP each, over rows sorted by expert."""

    def __init__(self, experts: int, hidden: int, width: int, gradients: WeightGradients, dtype: torch.dtype):
        super().__init__()
        self.gate_up = GroupedLinear(experts, hidden, 2 * width, gradients, dtype=dtype)
        self.down = GroupedLinear(experts, width, hidden, gradients, dtype=dtype)

    def forward(self, x_RD: Tensor, rows: list[int]) -> Tensor:
        return self.down(swiglu(self.gate_up(x_RD, rows)), rows)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of (..., 2F) -> (..., F), keeping only its input for backward."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        to_gate, to_up = result.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=to_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=to_gate)
        return result

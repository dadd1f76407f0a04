"""Linear and grouped linear layers whose weight gradient can be queued.

T rows, I input features, O output features, N experts of this rank, R rows sorted by expert
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipermoe.modules.weight_gradients import (
    WeightGradients,
    accumulate,
    accumulate_product,
    add_product,
    gradient_of,
)


class Linear(nn.Module):
    """`y_TO = x_TI @ weight_OI.T + bias_O`."""

    def __init__(
        self, inputs: int, outputs: int, gradients: WeightGradients, *, bias: bool = False, dtype=torch.float32
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None
        self.gradients = gradients

    def forward(self, x_TI: Tensor) -> Tensor:
        return _Linear.apply(x_TI, self)

    def accumulate_gradients(self, x_TI: Tensor, gradient_TO: Tensor) -> None:
        accumulate_product(self.weight, gradient_TO.t(), x_TI)
        if self.bias is not None:
            accumulate(self.bias, gradient_TO.sum(0))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, layer: Linear) -> Tensor:
        ctx.save_for_backward(x_TI)
        ctx.layer = layer
        weight_IO = layer.weight.t()
        return x_TI @ weight_IO if layer.bias is None else torch.addmm(layer.bias, x_TI, weight_IO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor, None]:
        (x_TI,), layer = ctx.saved_tensors, ctx.layer
        x_TI = x_TI.detach()  # a queued product keeps the numbers, not the graph behind them nor the gradient beside
        layer.gradients.add(lambda: layer.accumulate_gradients(x_TI, gradient_TO))
        return gradient_TO @ layer.weight, None


class GroupedLinear(nn.Module):
    """One matrix for each expert: rows of expert n times `weight_NIO[n]`, plus `bias_NO[n]`."""

    def __init__(
        self,
        experts: int,
        inputs: int,
        outputs: int,
        gradients: WeightGradients,
        *,
        bias: bool = False,
        dtype=torch.float32,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, inputs, outputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(experts, outputs, dtype=dtype)) if bias else None
        self.gradients = gradients

    def forward(self, x_RI: Tensor, rows: list[int]) -> Tensor:
        """`rows[n]` consecutive rows of `x_RI` belong to expert n."""
        return _GroupedLinear.apply(x_RI, self, rows)

    def accumulate_gradients(self, x_RI: Tensor, gradient_RO: Tensor, rows: list[int]) -> None:
        accumulate_grouped_product(self.weight, x_RI, gradient_RO, rows)
        if self.bias is not None:
            accumulate(self.bias, torch.stack([part.sum(0) for part in gradient_RO.split(rows)]))


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, layer: GroupedLinear, rows: list[int]) -> Tensor:
        ctx.save_for_backward(x_RI)
        ctx.layer, ctx.rows = layer, rows
        y_RO = grouped_matmul(x_RI, layer.weight, rows)
        if layer.bias is not None:
            for part_O, bias_O in zip(y_RO.split(rows), layer.bias, strict=True):
                part_O.add_(bias_O)
        return y_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RO: Tensor) -> tuple[Tensor, None, None]:
        (x_RI,), layer, rows = ctx.saved_tensors, ctx.layer, ctx.rows
        gradient_RO, x_RI = gradient_RO.contiguous(), x_RI.detach()
        layer.gradients.add(lambda: layer.accumulate_gradients(x_RI, gradient_RO, rows))
        return grouped_matmul(gradient_RO, layer.weight.transpose(1, 2), rows), None, None


def grouped_matmul(x_RI: Tensor, weight_NIO: Tensor, rows: list[int]) -> Tensor:
    """Rows of each expert times its matrix.

    A loop of matrix products, except for bf16 on a GPU where one grouped kernel runs if every stride is a multiple of
    16 bytes. On a CPU the loop is the fastest form (fp32: `F.grouped_mm` about 20 times slower on two cores).
    """
    if has_grouped_kernel(x_RI, weight_NIO):
        return F.grouped_mm(x_RI, weight_NIO, offs=_ends(rows, x_RI.device))
    y_RO = x_RI.new_empty(x_RI.shape[0], weight_NIO.shape[2])
    start = 0
    for expert, count in enumerate(rows):
        if count:
            torch.mm(x_RI[start : start + count], weight_NIO[expert], out=y_RO[start : start + count])
        start += count
    return y_RO


@torch.no_grad()
def accumulate_grouped_product(weight_NIO: Tensor, x_RI: Tensor, gradient_RO: Tensor, rows: list[int]) -> None:
    """`weight.grad[n] += x_n.T @ gradient_n` over the rows of each expert n; an expert without rows adds nothing."""
    if has_grouped_kernel(x_RI, gradient_RO):
        accumulate(weight_NIO, F.grouped_mm(x_RI.t(), gradient_RO, offs=_ends(rows, x_RI.device)))
        return
    total_NIO = gradient_of(weight_NIO)
    start = 0
    for expert, count in enumerate(rows):
        if count:
            add_product(total_NIO[expert], x_RI[start : start + count].t(), gradient_RO[start : start + count])
        start += count


def has_grouped_kernel(a: Tensor, b: Tensor) -> bool:
    """Whether `F.grouped_mm` serves these operands: bf16 on a GPU, at least one row, strides of whole 16 bytes."""
    aligned = all(stride == 1 or stride * t.element_size() % 16 == 0 for t in (a, b) for stride in t.stride())
    return a.is_cuda and a.dtype == torch.bfloat16 and a.shape[0] > 0 and aligned


def _ends(rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)

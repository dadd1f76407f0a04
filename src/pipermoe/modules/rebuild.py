"""Selective recomputation: results that are dropped after the forward and rebuilt once, when backward first reads them.

`torch.utils.checkpoint` would compute the consumer again as well, and cannot be entered twice, as I and W would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

Function = Callable[[Tensor], Tensor]
Result = TypeVar("Result")


def rebuilding(drop: bool, function: Function, consumer: Callable[[Tensor], Result], x: Tensor) -> Result:
    """`consumer(function(x))`. With `drop` neither the function's graph nor its result stay for backward, only `x`.

    When backward of the consumer reads the result, the function runs again, once, whatever reads it how often. What
    the consumer keeps beside it, it keeps as ever. Nested calls work; the weight gradients of both are as without.
    """
    if not (drop and torch.is_grad_enabled()):
        return consumer(function(x))
    y = _Dropped.apply(x, function)
    node, storage, shape = y.grad_fn, y.untyped_storage()._cdata, y.shape

    def pack(saved: Tensor) -> Any:
        return node if saved.untyped_storage()._cdata == storage and saved.shape == shape else saved

    with saved_tensors_hooks(pack, _unpack):
        return consumer(y)


def _unpack(packed: Any) -> Tensor:
    return packed if isinstance(packed, Tensor) else _rebuild(packed)[1].detach()


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Function) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.rebuilt = function, None
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        x, y = _rebuild(ctx)
        ctx.rebuilt = None
        torch.autograd.backward(y, gradient)
        return x.grad, None


def _rebuild(node: Any) -> tuple[Tensor, Tensor]:
    """The function's input and its result with a graph between them."""
    if node.rebuilt is None:
        (x,) = node.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            node.rebuilt = x, node.function(x)
    return node.rebuilt

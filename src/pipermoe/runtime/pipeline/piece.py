"""Pieces: what a layer is cut into at its collectives, each differentiable by a graph of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Piece:
    """A differentiable function run forward once and backward once, with a graph of its own.

    The graph starts at detached copies of the inputs. Without `keep` only the inputs stay and backward rebuilds the
    graph; as collectives lie between pieces, none is repeated. Outputs are never kept: backward enters by their edges.
    """

    def __init__(self, function: Callable[..., Any], keep: bool):
        self._function, self._keep = function, keep
        self._inputs: tuple[Tensor, ...] = ()
        self._edges: list[GradientEdge] = []

    def forward(self, *inputs: Tensor) -> Any:
        """The function's outputs, detached."""
        self._inputs = tuple(tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs)
        with torch.set_grad_enabled(self._keep):
            outputs = self._function(*self._inputs)
        several = isinstance(outputs, tuple)
        if self._keep:
            self._edges = _edges(outputs if several else (outputs,))
        return tuple(output.detach() for output in outputs) if several else outputs.detach()

    def backward(self, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the inputs from those of the differentiable outputs; the piece is empty afterwards."""
        edges, inputs = self._edges, self._inputs
        if not self._keep:
            with torch.enable_grad():
                outputs = self._function(*inputs)
            edges = _edges(outputs if isinstance(outputs, tuple) else (outputs,))
            del outputs
        self._edges, self._inputs = [], ()
        torch.autograd.backward(edges, gradients)
        results = []
        for tensor in inputs:
            if tensor.requires_grad:
                assert tensor.grad is not None
                results.append(tensor.grad)
        return tuple(results)


def _edges(outputs: tuple[Tensor, ...]) -> list[GradientEdge]:
    return [get_gradient_edge(output) for output in outputs if output.requires_grad]

"""The operations of one training step, as calls to time. They are the kernels that the runtime runs.

T tokens, R rows of one expert, E experts of the rank, D hidden size, F expert width, N output width
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from pipermoe.measure.clock import Call
from pipermoe.measure.sizes import Widths

COLD_BYTES = 64 * 2**20  # operands and results rotate over this much memory
MOST_SETS = 32
POOL = 2**20  # random numbers


def cold(build: Callable[[], Sequence[Call]], bytes_of_one: float) -> list[Call]:
    """The calls that `build` makes, each rotating over operand sets of `bytes_of_one` that together fill no near cache.

    As many results stay alive, so that they too are written to cold memory: in a step, backward still needs what was
    written before.
    """
    sets = [build() for _ in range(max(1, min(MOST_SETS, round(COLD_BYTES / bytes_of_one))))]
    return [_rotating(calls) for calls in zip(*sets, strict=True)]


def _rotating(calls: Sequence[Call]) -> Call:
    turns = cycle(calls)
    results: deque[object] = deque(maxlen=len(calls))
    return lambda: results.append(next(turns)())


@dataclass(frozen=True, slots=True)
class Directions:
    """One differentiable operation: its forward call, and its backward call when forward has run."""

    forward: Call
    backward: Call


class Kernels:
    """Builds calls on one device in one floating-point type. Every call allocates its results, as a step does."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._pool = torch.randn(POOL, device=device, dtype=dtype)

    @property
    def element_bytes(self) -> int:
        return self.dtype.itemsize

    def in_fp32(self) -> Kernels:
        """The same for what stays fp32 in every recipe: masters, moments, gradients."""
        return self if self.dtype == torch.float32 else Kernels(self.device, torch.float32)

    def random(self, *shape: int) -> Tensor:
        """Normal numbers of `shape`, copied from one pool: drawing them anew took longer than what they are for."""
        count = math.prod(shape)
        pool = self._pool if count <= POOL else self._pool.repeat(-(-count // POOL))
        return pool[:count].clone().view(shape)

    def leaf(self, *shape: int) -> Tensor:
        return self.random(*shape).requires_grad_()

    def product(self, tokens: int, inner: int, outer: int) -> tuple[Call, Call, Call]:
        """y_TN = x_TD w_ND', dx_TD = g_TN w_ND and dw_ND += g_TN' x_TD of a dense layer."""
        x_TD, g_TN = self.random(tokens, inner), self.random(tokens, outer)
        w_ND, dw_ND = self.random(outer, inner), self.random(outer, inner)
        return lambda: x_TD @ w_ND.t(), lambda: g_TN @ w_ND, lambda: dw_ND.addmm_(g_TN.t(), x_TD)

    def grouped_product(self, rows: list[int], inner: int, outer: int) -> tuple[Call, Call, Call]:
        """The three products of `rows[e]` rows with the matrix of expert e, rows sorted by expert: a loop."""
        x_RD, g_RN = self.random(sum(rows), inner), self.random(sum(rows), outer)
        w_EDN, dw_EDN = self.random(len(rows), inner, outer), self.random(len(rows), inner, outer)
        parts = [slice(end - count, end) for end, count in zip(accumulate(rows), rows, strict=True)]

        def forward() -> Tensor:
            y_RN = x_RD.new_empty(x_RD.shape[0], outer)
            for expert, part in enumerate(parts):
                torch.mm(x_RD[part], w_EDN[expert], out=y_RN[part])
            return y_RN

        def input_gradient() -> Tensor:
            dx_RD = g_RN.new_empty(g_RN.shape[0], inner)
            for expert, part in enumerate(parts):
                torch.mm(g_RN[part], w_EDN[expert].t(), out=dx_RD[part])
            return dx_RD

        def weight_gradient() -> Tensor:
            for expert, part in enumerate(parts):
                dw_EDN[expert].addmm_(x_RD[part].t(), g_RN[part])
            return dw_EDN

        return forward, input_gradient, weight_gradient

    def attention(self, batch: int, seq_len: int, widths: Widths) -> Directions:
        """Causal scaled dot-product attention of `batch` sequences; heads lie inside tokens, as projected."""

        def heads(count: int) -> Tensor:
            return self.random(batch, seq_len, count, widths.head_dim).transpose(1, 2).requires_grad_()

        query, key, value = heads(widths.num_heads), heads(widths.num_kv_heads), heads(widths.num_kv_heads)
        shared = widths.num_heads != widths.num_kv_heads
        return differentiable(
            lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared),
            (query, key, value),
        )

    def addition(self, elements: int) -> tuple[Call]:
        """c = a + b: 12 bytes per fp32 element."""
        a, b = self.random(elements), self.random(elements)
        return (lambda: a + b,)

    def tiny_graph(self, operations: int) -> Call:
        """A chain of `operations` differentiable operations on 16 elements, forward and backward."""
        x = self.leaf(16)

        def run() -> None:
            y = x
            for _ in range(operations):
                y = y * 1.0
            y.backward(torch.ones_like(y))

        return run

    def reference(self, widths: Widths) -> Call:
        """A fixed mixture of products and element-wise work, a few milliseconds: the yardstick of cores and of noise.

        Its operands lie in no near cache, as in a step: a core that ranks take turns on has none of them in it.
        """
        hidden, width, tokens = widths.hidden, widths.expert_width, 512

        def build() -> tuple[Call]:
            x_TD, w_ND = self.random(tokens, hidden), self.random(2 * width, hidden)

            def run() -> Tensor:
                gate, up = (x_TD @ w_ND.t()).chunk(2, dim=-1)
                return F.silu(gate).mul_(up)

            return (run,)

        [call] = cold(build, self.element_bytes * (tokens * (hidden + 4 * width) + 2 * width * hidden))
        return call


def differentiable(forward: Call, leaves: tuple[Tensor, ...]) -> Directions:
    """Both directions of `forward`: backward asks autograd for the gradients of `leaves` again and again."""
    output = forward()
    assert isinstance(output, Tensor)
    gradient = output.detach().clone()
    return Directions(forward, lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True))

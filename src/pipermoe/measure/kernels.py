"""The operations of one training step, as calls to time. They are the kernels that the runtime runs.

T tokens, R rows of one expert, E experts of the rank, D hidden size, F expert width, N output width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipermoe.measure.clock import Call
from pipermoe.measure.sizes import Widths
from pipermoe.specs.platform import Pass

COLD_BYTES = 8 * 2**20  # operands rotate over this much memory: in a step nothing waits in the second-level cache
MOST_SETS = 8
NORM_BLOCK = 2**14
Set = TypeVar("Set")


@dataclass(frozen=True, slots=True)
class Directions:
    """One differentiable operation: the forward call, and the backward call of a graph that stands."""

    forward: Call
    backward: Call | None


class Kernels:
    """Builds calls on one device in one floating-point type. Every call allocates its results, as a step does."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def leaf(self, *shape: int) -> Tensor:
        return self.random(*shape).requires_grad_()

    def _rotating(self, bytes_of_one: float, build: Callable[[], Set]) -> Iterator[Set]:
        """An endless rotation over operand sets that together exceed the second-level cache."""
        return cycle([build() for _ in range(max(1, min(MOST_SETS, round(COLD_BYTES / bytes_of_one))))])

    def product(self, tokens: int, inner: int, outer: int) -> tuple[Call, Call, Call]:
        """y_TN = x_TD w_ND', dx_TD = g_TN w_ND and dw_ND += g_TN' x_TD of a dense layer."""
        operand_bytes = 4 * (tokens * inner + tokens * outer + 2 * inner * outer)
        sets = self._rotating(
            operand_bytes,
            lambda: (
                self.random(tokens, inner),
                self.random(outer, inner),
                self.random(tokens, outer),
                self.random(outer, inner),
            ),
        )

        def forward() -> Tensor:
            x_TD, w_ND, _, _ = next(sets)
            return x_TD @ w_ND.t()

        def input_gradient() -> Tensor:
            _, w_ND, g_TN, _ = next(sets)
            return g_TN @ w_ND

        def weight_gradient() -> Tensor:
            x_TD, _, g_TN, dw_ND = next(sets)
            return dw_ND.addmm_(g_TN.t(), x_TD)

        return forward, input_gradient, weight_gradient

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
        return self._differentiable(
            lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared),
            (query, key, value),
        )

    def addition(self, elements: int) -> Call:
        """c = a + b: 12 bytes per fp32 element."""
        sets = self._rotating(8 * elements, lambda: (self.random(elements), self.random(elements)))

        def add() -> Tensor:
            a, b = next(sets)
            return a + b

        return add

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
        """A fixed mixture of products and element-wise work, a few milliseconds: the yardstick of host noise."""
        x_TD, w_ND = self.random(512, widths.hidden), self.random(2 * widths.expert_width, widths.hidden)

        def run() -> Tensor:
            gate, up = (x_TD @ w_ND.t()).chunk(2, dim=-1)
            return (F.silu(gate) * up).sum()

        return run

    def _differentiable(self, forward: Call, leaves: tuple[Tensor, ...]) -> Directions:
        output = forward()
        assert isinstance(output, Tensor)
        gradient = torch.randn_like(output)
        return Directions(forward, lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True))

    def memory_bound(self, kind: Pass, tokens: int, widths: Widths) -> tuple[int, Directions]:
        """The elements and the calls of one pass of `kind` over `tokens` tokens (see `specs.platform.Pass`)."""
        match kind:
            case "norm":
                return self._norm(tokens, widths)
            case "residual":
                x, y = self.leaf(tokens, widths.hidden), self.leaf(tokens, widths.hidden)
                dx, dy = torch.randn_like(x), torch.randn_like(y)
                # The addition itself has a free backward; where the stream forks, the branches' gradients are added.
                return x.numel(), Directions(lambda: x + y, lambda: dx + dy)
            case "rope":
                return self._rope(tokens, widths)
            case "swiglu":
                gate_up = self.leaf(tokens, 2 * widths.expert_width)
                return gate_up.numel() // 2, self._differentiable(lambda: _swiglu(gate_up), (gate_up,))
            case "router":
                scores = self.leaf(tokens, widths.num_experts)
                return tokens * widths.top_k, self._differentiable(lambda: _route(scores, widths.top_k), (scores,))
            case "permute":
                return self._permute(tokens, widths)
            case "combine":
                return self._combine(tokens, widths)
            case "loss":
                logits = self.leaf(tokens, widths.vocab)
                targets = torch.randint(widths.vocab, (tokens,), device=self.device)
                return logits.numel(), self._differentiable(lambda: F.cross_entropy(logits, targets), (logits,))
            case _:
                raise ValueError(f"{kind} is not a pass over tokens")

    def _norm(self, tokens: int, widths: Widths) -> tuple[int, Directions]:
        x_TD, g_TD = self.random(tokens, widths.hidden), self.random(tokens, widths.hidden)
        w_D, dw_D = self.random(widths.hidden), self.random(widths.hidden)
        inverse_T1 = x_TD.square().mean(-1, keepdim=True).rsqrt_()

        def forward() -> Tensor:
            inverse = x_TD.square().mean(-1, keepdim=True).add_(1e-6).rsqrt_()
            return (x_TD * inverse).mul_(w_D)

        def backward() -> Tensor:
            normal_TD = x_TD * inverse_T1
            dw_D.add_((g_TD * normal_TD).sum(0))
            scaled_TD = g_TD * w_D
            mean_T1 = (scaled_TD * normal_TD).mean(-1, keepdim=True)
            return scaled_TD.sub_(normal_TD.mul_(mean_T1)).mul_(inverse_T1)

        return x_TD.numel(), Directions(forward, backward)

    def _rope(self, tokens: int, widths: Widths) -> tuple[int, Directions]:
        x = self.random(1, tokens, widths.num_heads, widths.head_dim).transpose(1, 2).requires_grad_()
        cosine, sine = self.random(tokens, widths.head_dim), self.random(tokens, widths.head_dim)

        def rotate() -> Tensor:
            low, high = x.chunk(2, dim=-1)
            return x * cosine + torch.cat((-high, low), dim=-1) * sine

        return x.numel(), self._differentiable(rotate, (x,))

    def _permute(self, tokens: int, widths: Widths) -> tuple[int, Directions]:
        x_TD = self.leaf(tokens, widths.hidden)
        source_R = torch.randperm(tokens * widths.top_k, device=self.device) // widths.top_k
        return source_R.numel() * widths.hidden, self._differentiable(lambda: x_TD.index_select(0, source_R), (x_TD,))

    def _combine(self, tokens: int, widths: Widths) -> tuple[int, Directions]:
        y_RD, weight_R = self.leaf(tokens * widths.top_k, widths.hidden), self.leaf(tokens * widths.top_k)
        target_R = torch.randperm(tokens * widths.top_k, device=self.device) // widths.top_k

        def add_up() -> Tensor:
            return y_RD.new_zeros(tokens, widths.hidden).index_add(0, target_R, y_RD * weight_R[:, None])

        return y_RD.numel(), self._differentiable(add_up, (y_RD, weight_R))

    def optimizer(self, parameters: int) -> Call:
        """One fused AdamW update of a flat buffer of `parameters` parameters."""
        weights = torch.nn.Parameter(self.random(parameters))
        weights.grad = torch.randn_like(weights)
        return torch.optim.AdamW([weights], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True).step

    def gradient_norm(self, parameters: int) -> Call:
        """The exact norm of a flat buffer of `parameters` gradients (fp64 over blocks), scaling and zeroing it."""
        gradients = self.random(parameters)

        def run() -> None:
            blocks = gradients.split(NORM_BLOCK)
            norms = torch.stack(torch._foreach_norm(blocks))  # pyright: ignore[reportPrivateImportUsage]
            norm = norms.double().square().sum().sqrt()
            gradients.mul_(1.0 / max(1.0, float(norm)))
            gradients.zero_()

        return run


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _route(scores_TE: Tensor, top_k: int) -> Tensor:
    """Weights of the chosen experts, the balancing loss, and the stable sort that groups rows by expert."""
    experts = scores_TE.shape[1]
    share_TE = scores_TE.softmax(dim=-1)
    experts_TK = share_TE.detach().topk(top_k, dim=-1).indices
    weights_TK = share_TE.gather(1, experts_TK)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    choices = experts_TK.flatten()
    choices.argsort(stable=True)
    load_E = torch.zeros(experts, dtype=torch.int64, device=choices.device)
    load_E.scatter_add_(0, choices, torch.ones_like(choices))
    balance = experts * (load_E.to(share_TE.dtype) / choices.numel() * share_TE.mean(0)).sum()
    return torch.cat((weights_TK.flatten(), balance[None]))

"""The operations of one MoE layer in their order, as calls: what they cost in turn beyond what each costs repeated.

A repeated operation finds its own code and Python's objects in the caches; in a step every operation finds those of the
one before. On few tokens that is most of the time, and no curve of a repeated operation holds it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipermoe.measure import passes
from pipermoe.measure.clock import Call
from pipermoe.measure.kernels import Directions, Kernels
from pipermoe.measure.sizes import Widths

TOKENS = 16


@dataclass(frozen=True, slots=True)
class LayerCalls:
    """The calls of one layer in each direction."""

    forward: list[Call] = field(default_factory=list)
    backward: list[Call] = field(default_factory=list)

    def add(self, directions: Directions) -> None:
        self.forward.append(directions.forward)
        self.backward.append(directions.backward)

    def add_product(self, product: tuple[Call, Call, Call]) -> None:
        forward, *backward = product
        self.forward.append(forward)
        self.backward.extend(backward)


def layer_calls(kernels: Kernels, widths: Widths) -> LayerCalls:
    """One layer of `TOKENS` tokens with operands of its own, in the order of modules."""
    calls = LayerCalls()
    hidden, rows = widths.hidden, [max(1, TOKENS * widths.top_k // widths.experts)] * widths.experts
    calls.add(passes.norm(kernels, TOKENS, widths))
    for outer in (widths.query, widths.key_value, widths.key_value):
        calls.add_product(kernels.product(TOKENS, hidden, outer))
    for build in (passes.head_norm, passes.head_norm, passes.rope, passes.rope):
        calls.add(build(kernels, TOKENS, widths))
    calls.add(kernels.attention(1, TOKENS, widths))
    calls.add_product(kernels.product(TOKENS, widths.query, hidden))
    calls.add(passes.residual(kernels, TOKENS, widths))
    calls.add(passes.norm(kernels, TOKENS, widths))
    calls.add_product(kernels.product(TOKENS, hidden, widths.num_experts))
    for build in (passes.router, passes.permute, passes.permute, passes.permute):
        calls.add(build(kernels, TOKENS, widths))
    calls.add_product(kernels.grouped_product(rows, hidden, 2 * widths.expert_width))
    calls.add(passes.swiglu(kernels, TOKENS * widths.top_k, widths))
    calls.add_product(kernels.grouped_product(rows, widths.expert_width, hidden))
    calls.add(passes.combine(kernels, TOKENS, widths))
    calls.add(passes.residual(kernels, TOKENS, widths))
    return calls

"""What a whole layer keeps, attention included, and the instants of its backward in which it needs most on top.

A layer with experts is cut at its all-to-alls: attend, experts, shared, merge (`runtime/pipeline/stage.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipermoe.resources.activations.attention import attention_memory
from pipermoe.resources.activations.carried import carried
from pipermoe.resources.activations.sizes import (
    INDEX_BYTES,
    STATISTIC_BYTES,
    BlockMemory,
    Moment,
    Recompute,
    Sizes,
)


def moe_layer(sizes: Sizes, recompute: Recompute) -> BlockMemory:
    """Attention and a mixture of experts."""
    moe, hidden, stream, full = sizes.model.moe, sizes.hidden, sizes.stream, recompute.full
    width = moe.expert_width / sizes.etp
    rows, arrived = sizes.rows * sizes.model.hidden_size * sizes.element, sizes.arriving_by(sizes.model.hidden_size)
    gate_up, gated = sizes.arriving_by((moe.expert_matrices - 1) * width), sizes.arriving_by(width)
    attend = attention_memory(sizes, recompute)
    router = stream * (moe.num_experts + moe.top_k + moe.router.normalize_top_k) * STATISTIC_BYTES
    choices = sizes.rows * INDEX_BYTES
    weights = sizes.rows * sizes.element
    travels = sizes.ep > 1
    sorts = travels & (sizes.local_experts > 1)  # rows that arrive from several ranks are sorted by expert
    way = carried(sizes)
    has_shared = moe.shared_width > 0
    shared, to_shared = _shared(sizes), hidden * has_shared  # the gradient that waits for that of the routed experts
    keeps_gate_up, keeps_gated = 1 - recompute.experts, 1 - (recompute.experts | recompute.moe_act)
    # A piece of its own, shared experts keep their normalised input: another one than what attention rebuilds.
    shared_input = to_shared * (recompute.norm | recompute.full)
    shared_kept = shared * (1 - recompute.shared_experts) + to_shared * recompute.norm
    inside = gate_up * keeps_gate_up + gated * keeps_gated
    in_graph = way.inputs + way.expanded + inside
    kept = attend.kept + router + choices + way.places + in_graph + way.results + way.returned + shared_kept
    kept_full = hidden + way.places + way.inputs + way.returned + to_shared
    # Inputs and output gradients: of both products of experts and shared experts; then those of router and attention.
    behind_experts = 2 * arrived + gate_up + gated + shared + to_shared
    behind_router = hidden + stream * moe.num_experts * sizes.element
    deferred = behind_experts + shared_input + attend.deferred + behind_router
    rebuilt = gate_up * (1 - keeps_gate_up) + gated * (1 - keeps_gated)
    # The gated product's backward: its gradient, the result, silu(gate); clamped, both factors before and after.
    product = hidden + to_shared + weights + arrived + gate_up + (6 if moe.swiglu_limit else 2) * gated
    at_attend = 4 * hidden + weights  # the gradients of h, of its norm and of its sum, and one in the making
    # The merge multiplies its gradient by weights and by rows; then it travels. Or copies of it do, and experts begin
    # with the products of their weighted sums.
    merging = (
        Moment(0, 0, hidden + 2 * rows),
        Moment(way.returned, (rows + arrived) * travels, hidden + weights + arrived * sorts),
    )
    summing = (
        Moment(0, 2 * way.landed, hidden),
        Moment(shared_kept + way.results / 2, way.landed, hidden + to_shared + 3 * arrived + rebuilt),
    )
    moments = (
        *_choose(way.once, summing, merging),
        # What is rebuilt stays to the end.
        Moment(way.returned + way.results + gated * keeps_gated + shared_kept, way.landed, product + rebuilt),
        Moment(in_graph + way.results + way.returned + shared_kept, 0, at_attend + attend.whole - attend.kept),
    )
    rebuilding = (
        Moment(0, 2 * way.landed, hidden),
        Moment(to_shared, way.landed, hidden + to_shared + 5 * arrived + gate_up + gated),
    )
    of_full = (
        *_choose(way.once, rebuilding, (Moment(0, 0, hidden + 3 * rows), merging[1])),
        Moment(way.returned + to_shared, way.landed, product + gate_up + way.expanded),
        Moment(way.returned + way.inputs + to_shared, 0, at_attend + to_shared + attend.whole + router + choices),
    )
    return BlockMemory(
        kept=_either(full, kept_full, kept),
        deferred=deferred,
        forward=way.forward,
        moments=_choose(full, of_full, moments),
        deferring=_choose(
            full,
            (
                *of_full[:2],
                _plus(of_full[2], gated + shared + to_shared),
                _plus(of_full[3], behind_experts + shared_input + behind_router),
            ),
            (
                *moments[:2],
                _plus(moments[2], gated * keeps_gated + shared),
                _plus(moments[3], behind_experts + shared_input + behind_router),
            ),
        ),
    )


def _plus(moment: Moment, waiting: Any) -> Moment:
    """The same instant when tensors that a full backward has freed by then wait for their weight gradients."""
    return Moment(moment.freed, moment.communication, moment.temporary + waiting)


def _shared(sizes: Sizes) -> Any:
    """Shared experts: gate and up in one tensor, their product, and with an output gate its value and the output."""
    moe = sizes.model.moe
    gated = (sizes.stream * sizes.element + sizes.hidden) * moe.shared_gate
    return sizes.tokens_by(moe.expert_matrices * moe.shared_width) + gated


def dense_layer(sizes: Sizes, recompute: Recompute) -> BlockMemory:
    """Attention and a gated MLP, one piece."""
    attend, width, hidden = attention_memory(sizes, recompute), sizes.model.dense_width, sizes.hidden
    gate_up, gated = sizes.tokens_by((sizes.model.dense_matrices - 1) * width), sizes.tokens_by(width)
    inside = (gate_up + gated) * (1 - recompute.dense_mlp)
    backward = hidden + gate_up + 2 * gated
    rebuilt = attend.whole - hidden + gate_up + gated
    kept = attend.kept + inside
    of_full = (Moment(0, 0, rebuilt - gated + backward),)
    moments = (Moment(gated * (1 - recompute.dense_mlp), 0, backward + gate_up * recompute.dense_mlp),)
    return BlockMemory(
        kept=_either(recompute.full, hidden, kept),
        deferred=attend.deferred + 2 * hidden + 2 * gate_up / (sizes.model.dense_matrices - 1) + gated,
        forward=0 * hidden,
        moments=_choose(recompute.full, of_full, moments),
        deferring=tuple(
            Moment(m.freed, m.communication, m.temporary + gated) for m in _choose(recompute.full, of_full, moments)
        ),
    )


def _either(mask: Any, yes: Any, no: Any) -> Any:
    return np.where(mask, yes, no)


def _choose(mask: Any, yes: tuple[Moment, ...], no: tuple[Moment, ...]) -> tuple[Moment, ...]:
    """The moments of each strategy; the shorter list repeats its first."""
    pairs = zip(yes, (*no, *[no[0]] * (len(yes) - len(no))), strict=True)
    return tuple(
        Moment(*(_either(mask, getattr(y, f), getattr(n, f)) for f in ("freed", "communication", "temporary")))
        for y, n in pairs
    )

"""A whole layer, attention included, as scripts of its forward and its backward.

A layer with experts is cut at its all-to-alls (`runtime/pipeline/stage.py`). A forward attends, routes, computes and
merges, a backward splits, computes and attends: between these steps other work may come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipermoe.resources.activations.attention import (
    attend,
    attend_backward,
    attention_matrices,
    normalise_backward,
    renormalise,
)
from pipermoe.resources.activations.journeys import Deduplicated, Plain
from pipermoe.resources.activations.ledger import IN_ALL, Amount, BlockMemory, Ledger
from pipermoe.resources.activations.sizes import INDEX_BYTES, STATISTIC_BYTES, Recompute, Sizes, product_bytes

CLAMPED_FACTORS = 5  # tensors of a clamped product's backward beside its gradients; of a plain one silu(gate)


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The tensors inside of experts or an MLP, and masks of what is dropped after the forward.

    `drops_inside` and `drops_gated` are of selective recomputation: what it rebuilds stays to the block's end.
    """

    gate_up: Any
    gated: Any
    full: Any
    drops_inside: Any
    drops_gated: Any = 0
    factors: int = 1

    def forward(self, work: Ledger, result: Any) -> None:
        """The result in hand, beside what is kept."""
        work.take(self.gate_up)
        work.take(self.factors // 2 * self.gated + self.gated)
        work.drop(self.factors // 2 * self.gated, self.gate_up * self.drops_inside)
        work.take(result)
        work.drop(self.gated * (self.drops_inside | self.drops_gated | self.full), self.gate_up * self.full)

    def backward(self, work: Ledger, result: Any, early: Any = 0) -> None:
        """From the gradient of the result to that of the input, which has the size `result`.

        `early` is a gradient of the result that goes as soon as its one product has read it.
        """
        some = self.drops_inside | self.drops_gated
        work.take(self.gate_up * self.drops_inside, self.gated * some)
        work.take(self.gated)
        work.release(early)
        work.release(self.gated * (1 - (some | self.full)), of="activations")
        work.release(self.gated * self.full)
        work.take(self.gate_up)
        work.brief(self.factors * self.gated)
        work.drop(self.gated)
        work.free(self.gate_up, self.drops_inside | self.full)
        work.take(result)
        work.release(self.gate_up, self.gated * some)


def moe_layer(sizes: Sizes, recompute: Recompute) -> BlockMemory:
    """Attention and a mixture of experts, by the dispatcher of each strategy; within a single rank all is plain."""
    once = (sizes.ep > 1) & np.asarray(sizes.deduplicated)
    by_way = [
        _moe_layer(sizes, recompute, way(sizes, recompute))
        for way, taken in ((Deduplicated, np.any(once)), (Plain, not np.all(once)))
        if taken
    ]
    return by_way[0] if len(by_way) == 1 else by_way[0].where(once, by_way[1])


def _moe_layer(sizes: Sizes, recompute: Recompute, way: Plain | Deduplicated) -> BlockMemory:
    forward = _moe_forward(sizes, recompute, way)
    backward = (_moe_backward(sizes, recompute, way, forward.now, defers=defers) for defers in (False, True))
    return BlockMemory(forward.now, *(tuple(work.steps) for work in (forward, *backward)), product=_moe_product(sizes))


def _moe_product(sizes: Sizes) -> Amount:
    """Of one expert at a time."""
    moe, hidden = sizes.model.moe, sizes.model.hidden_size
    expert = hidden * (moe.expert_matrices - 1) * moe.expert_width / sizes.etp
    shared = hidden * (moe.expert_matrices - 1) * moe.shared_width / sizes.tp
    widest = product_bytes(sizes, expert, shared, hidden * moe.num_experts, *attention_matrices(sizes))
    return sizes.nothing.more(widest, "temporary")


def _moe_forward(sizes: Sizes, recompute: Recompute, way: Plain | Deduplicated) -> Ledger:
    hidden, full, choices = sizes.hidden, recompute.full, sizes.rows * INDEX_BYTES
    work = Ledger("activations", sizes.nothing)
    work.take(hidden)
    attend(work, sizes, recompute)
    work.take(_scores(sizes), choices, way.weights)
    work.drop(_scores(sizes) * full)
    work.end_step()

    work.take(way.places)
    way.depart(work)
    work.end_step()

    has_shared = int(sizes.model.moe.shared_width > 0)
    if has_shared:
        _shared_forward(work, sizes, recompute)
    work.drop(hidden * (recompute.norm | full) * (1 - has_shared))  # what was sent, if nothing else reads it
    way.arrive(work)
    way.unpack(work)
    _experts(sizes, recompute).forward(work, way.arrived)
    way.pack(work)
    way.leave(work)
    work.end_step()

    way.come_back(work)
    way.merge(work)
    work.drop(hidden * has_shared, (hidden + choices) * full)  # shared experts' results, the residual
    work.end_step()
    work.drop(hidden)  # the output, which is the next layer's
    return work


def _moe_backward(
    sizes: Sizes, recompute: Recompute, way: Plain | Deduplicated, kept: Amount, *, defers: bool
) -> Ledger:
    hidden, has_shared = sizes.hidden, int(sizes.model.moe.shared_width > 0)
    work = Ledger("temporary", kept.more(hidden, "temporary"), defers=defers)
    way.split(work)
    work.end_step()

    if has_shared:
        _shared_backward(work, sizes, recompute)
    way.arrive(work)
    experts = _experts(sizes, recompute)
    way.rebuild(work, experts.gate_up + experts.gated)
    way.unpack_backward(work)
    experts.backward(work, way.arrived, way.early)
    way.pack_backward(work)
    way.leave(work)
    work.end_step()

    way.come_back(work)
    way.gather(work)
    _rebuild_attention(work, sizes, recompute, _scores(sizes))
    _router_backward(work, sizes, recompute)
    attend_backward(work, sizes, recompute)
    work.drop(hidden, hidden * has_shared, way.weights)
    reads_gradient = has_shared * (1 - sizes.model.moe.shared_gate)
    work.release(hidden * reads_gradient)
    work.drop(hidden * (1 - reads_gradient))
    work.drop(way.places, sizes.rows * INDEX_BYTES * (1 - recompute.full), of="activations")
    work.end_step()
    return work


def _scores(sizes: Sizes) -> Any:
    """Of the router: every expert's, the chosen ones', their sum."""
    moe = sizes.model.moe
    return sizes.stream * (moe.num_experts + moe.top_k + moe.router.normalize_top_k) * STATISTIC_BYTES


def _experts(sizes: Sizes, recompute: Recompute) -> FeedForward:
    moe = sizes.model.moe
    width = moe.expert_width / sizes.etp
    return FeedForward(
        gate_up=sizes.arriving_by((moe.expert_matrices - 1) * width),
        gated=sizes.arriving_by(width),
        full=1 * recompute.full,
        drops_inside=1 * recompute.experts,
        drops_gated=1 * recompute.moe_act,
        factors=CLAMPED_FACTORS if moe.swiglu_limit else 1,
    )


def _shared(sizes: Sizes, recompute: Recompute) -> FeedForward:
    moe = sizes.model.moe
    return FeedForward(
        gate_up=sizes.tokens_by((moe.expert_matrices - 1) * moe.shared_width),
        gated=sizes.tokens_by(moe.shared_width),
        full=1 * recompute.full,
        drops_inside=1 * recompute.shared_experts,
    )


def _shared_forward(work: Ledger, sizes: Sizes, recompute: Recompute) -> None:
    """With an output gate its values and the output before it are kept beside the result."""
    hidden, gate = sizes.hidden, sizes.stream * sizes.element
    _shared(sizes, recompute).forward(work, hidden)
    if sizes.model.moe.shared_gate:
        work.take(gate, hidden)
        work.drop((hidden + gate) * recompute.full)


def _shared_backward(work: Ledger, sizes: Sizes, recompute: Recompute) -> None:
    """The gradient of their input in hand, which waits for that of the routed experts."""
    hidden, gate, full = sizes.hidden, sizes.stream * sizes.element, recompute.full
    shared = _shared(sizes, recompute)
    gates = int(sizes.model.moe.shared_gate)
    work.take((shared.gate_up + shared.gated + hidden + gate * gates) * full)
    work.brief(hidden * gates * full)
    work.drop(hidden * (1 - gates) * full)
    work.take(hidden * gates)
    work.brief(hidden * gates)
    work.free((hidden + gate) * gates, full)
    work.take(gate * gates, hidden * gates)
    shared.backward(work, hidden)
    work.take(hidden * gates)
    work.drop(2 * hidden * gates)
    work.release(hidden * gates, gate * gates)
    work.release(hidden * (recompute.norm | full), of="activations")


def _rebuild_attention(work: Ledger, sizes: Sizes, recompute: Recompute, scores: Any) -> None:
    """All of a piece that full recomputation has dropped."""
    again = Ledger("temporary", IN_ALL)
    attend(again, sizes, Recompute())
    work.take(again.now.total * recompute.full, sizes.hidden * recompute.full, scores * recompute.full)
    work.drop(sizes.hidden * recompute.full)


def _router_backward(work: Ledger, sizes: Sizes, recompute: Recompute) -> None:
    """From the gradients of h, of its norm and of the weights in hand to all of h's, also in hand; h goes."""
    hidden, logits = sizes.hidden, sizes.stream * sizes.model.moe.num_experts * sizes.element
    work.free(_scores(sizes), recompute.full)
    work.take(logits)
    renormalise(work, sizes, recompute)
    work.take(hidden)
    work.release(logits, hidden * recompute.full)
    work.release(hidden * (1 - (recompute.norm | recompute.full)), of="activations")
    work.take(hidden)
    work.drop(hidden)
    _residual_backward(work, sizes, recompute)


def _residual_backward(work: Ledger, sizes: Sizes, recompute: Recompute) -> None:
    """From the gradient of h's norm in hand to that of h, of both ways; h goes, and its norm if it was rebuilt."""
    hidden = sizes.hidden
    normalise_backward(work, sizes)
    work.drop(hidden)
    work.release(hidden * recompute.norm)
    work.free(hidden, recompute.full)
    work.free(sizes.stream * STATISTIC_BYTES, recompute.norm | recompute.full)
    work.take(hidden)
    work.drop(hidden)


def dense_layer(sizes: Sizes, recompute: Recompute) -> BlockMemory:
    """Attention and an MLP, one piece."""
    forward = _dense_forward(sizes, recompute)
    backward = (_dense_backward(sizes, recompute, forward.now, defers=defers) for defers in (False, True))
    widest = sizes.model.hidden_size * (sizes.model.dense_matrices - 1) * sizes.model.dense_width / sizes.tp
    product = sizes.nothing.more(product_bytes(sizes, widest, *attention_matrices(sizes)), "temporary")
    return BlockMemory(forward.now, *(tuple(work.steps) for work in (forward, *backward)), product=product)


def _mlp(sizes: Sizes, recompute: Recompute) -> FeedForward:
    matrices, width = sizes.model.dense_matrices, sizes.model.dense_width
    return FeedForward(
        gate_up=sizes.tokens_by((matrices - 1) * width),
        gated=sizes.tokens_by(width),
        full=1 * recompute.full,
        drops_inside=1 * recompute.dense_mlp,
    )


def _dense_forward(sizes: Sizes, recompute: Recompute) -> Ledger:
    hidden, full = sizes.hidden, recompute.full
    work = Ledger("activations", sizes.nothing)
    work.take(hidden)
    attend(work, sizes, recompute)
    _mlp(sizes, recompute).forward(work, hidden)
    work.drop(hidden * (recompute.norm | full))
    work.take(hidden)  # the sum
    work.drop(hidden, hidden * full)
    work.end_step()
    work.drop(hidden)  # the output, which is the next layer's
    return work


def _dense_backward(sizes: Sizes, recompute: Recompute, kept: Amount, *, defers: bool) -> Ledger:
    hidden, mlp = sizes.hidden, _mlp(sizes, recompute)
    work = Ledger("temporary", kept.more(hidden, "temporary"), defers=defers)
    _rebuild_attention(work, sizes, recompute, 0)
    work.take((mlp.gate_up + mlp.gated) * recompute.full)
    work.brief(2 * hidden * recompute.full)
    renormalise(work, sizes, recompute)
    mlp.backward(work, hidden)
    work.release(hidden * recompute.full)
    work.release(hidden * (1 - (recompute.norm | recompute.full)), of="activations")
    _residual_backward(work, sizes, recompute)
    attend_backward(work, sizes, recompute)
    work.release(hidden)  # the gradient of the output
    work.end_step()
    return work

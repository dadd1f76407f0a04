"""What one micro-batch computes on a stage, operation by operation, and how long that takes on a device.

The operations are those that the runtime executes (`modules`, `runtime/pipeline`); their FLOPs add up to
`resources.flops`. Arrays broadcast: one entry per strategy, or one number.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import singledispatch
from typing import Any

import numpy as np

from pipermoe.resources.activations.sizes import Recompute, Sizes
from pipermoe.resources.flops import (
    attention_core_flops,
    core_padding_flops,
    head_forward_flops,
    join_forward_flops,
    layer_forward_flops,
    rebuilt_forward_flops,
)
from pipermoe.resources.rates import attention_seconds, cast_seconds, gemm_seconds, grouped_gemm_seconds, pass_seconds
from pipermoe.resources.stages import StageShapes
from pipermoe.specs.device import Device, Pass
from pipermoe.specs.model import Attention, GroupedQueryAttention, LatentAttention, ModelSpec
from pipermoe.specs.precision import Precision
from pipermoe.specs.strategy import RecomputeModule


@dataclass(frozen=True, slots=True)
class Gemm:
    """`count` matrix products of `flops` forward FLOPs each."""

    flops: Any
    count: int = 1


@dataclass(frozen=True, slots=True)
class GroupedGemm:
    """A product per expert, `flops` in all, every expert with `rows_per_expert` rows and of `width`."""

    flops: Any
    rows_per_expert: Any
    width: Any


@dataclass(frozen=True, slots=True)
class AttentionCore:
    """The causal attention core: `flops` is the full square that the kernel is credited with, `padding` what it takes
    more where it wants values as wide as queries (`Device.pads_values`).
    """

    flops: Any
    seq_len: Any
    head_size: int
    padding: Any = 0


@dataclass(frozen=True, slots=True)
class Cast:
    """Elements that products read, and elements of the gradients of their results, in the precision of products."""

    inputs: Any
    gradients: Any


@dataclass(frozen=True, slots=True)
class Stream:
    """`count` named memory-bound passes over `elements` each."""

    name: Pass
    elements: Any
    count: Any = 1


Work = Gemm | GroupedGemm | AttentionCore | Cast | Stream


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one micro-batch: forward, and of the backward the input gradients and the weight gradients apart.

    A zero-bubble schedule may postpone only the second: one product per weight.
    """

    forward: Any
    input_grad: Any
    weight_grad: Any

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.forward + other.forward, self.input_grad + other.input_grad, self.weight_grad + other.weight_grad
        )


def seconds(work: Work, device: Device, precision: Precision) -> Seconds:
    """The seconds of one operation, alone on the device."""
    match work:
        case Gemm(flops, count):
            forward = count * gemm_seconds(device, precision, flops)
            return Seconds(forward, forward, forward)
        case GroupedGemm(flops, rows, width):
            forward = grouped_gemm_seconds(device, precision, flops, rows, width)
            return Seconds(forward, forward, forward)
        case AttentionCore(flops, seq_len, head_size, padding):
            executed = flops + padding * device.pads_values
            forward, backward = attention_seconds(device, precision, executed, seq_len, head_size)
            return Seconds(forward, backward, 0.0 * backward)
        case Cast(inputs, gradients):
            forward, backward = (cast_seconds(device, precision, elements) for elements in (inputs, gradients))
            return Seconds(forward, backward, 0.0 * backward)
        case Stream(name, elements, count):
            forward, backward = pass_seconds(device, precision, name, elements)
            return Seconds(count * forward, count * backward, 0.0 * backward)


@singledispatch
def attention_inside(attention: Attention, sizes: Sizes) -> list[Work]:
    """Projections, rotation and core of one attention block, heads divided over tp, queries over cp.

    The output projection comes last.
    """
    raise TypeError(f"no price for {type(attention).__name__}")


@attention_inside.register
def _(attention: GroupedQueryAttention, sizes: Sizes) -> list[Work]:
    hidden, tokens = sizes.model.hidden_size, sizes.tokens
    query = attention.num_heads * attention.head_dim / sizes.tp
    key_value = attention.num_kv_heads * attention.head_dim / sizes.tp
    work: list[Work] = [
        Gemm(2 * tokens * hidden * query),
        Gemm(2 * tokens * hidden * key_value, count=2),
        Cast(tokens * (hidden + query), tokens * (query + 2 * key_value + hidden)),
        Stream("rope", tokens * query),
        Stream("rope", tokens * key_value),
        _core(sizes),
    ]
    if attention.qk_norm != "none":
        norm: Pass = "norm" if attention.qk_norm == "full" else "head_norm"
        work += [Stream(norm, tokens * query), Stream(norm, tokens * key_value)]
    return [*work, Gemm(2 * tokens * hidden * query)]


@attention_inside.register
def _(attention: LatentAttention, sizes: Sizes) -> list[Work]:
    """Down-projections and their norms on the residual stream, everything behind them by heads."""
    hidden, tokens, stream = sizes.model.hidden_size, sizes.tokens, sizes.stream
    heads, q_rank, kv_rank = attention.num_heads / sizes.tp, attention.q_lora_rank, attention.kv_lora_rank
    query, rotated = heads * attention.query_key_dim, heads * attention.qk_rope_head_dim
    expanded = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    compressed = (q_rank or 0) + kv_rank
    work: list[Work] = [
        Cast(
            stream * hidden + tokens * (compressed + heads * attention.v_head_dim),
            stream * (compressed + attention.qk_rope_head_dim) + tokens * (query + expanded + hidden),
        ),
        Gemm(2 * tokens * (q_rank or hidden) * query),
        Gemm(2 * stream * hidden * (kv_rank + attention.qk_rope_head_dim)),
        Stream("norm", stream * kv_rank),
        Gemm(2 * tokens * kv_rank * expanded),
        Stream("rope", tokens * rotated),
        Stream("permute", 2 * tokens * query),  # joining the rotated part of queries and keys to the rest
        _core(sizes),
    ]
    if q_rank:
        work += [Gemm(2 * stream * hidden * q_rank), Stream("norm", stream * q_rank)]
    return [*work, Gemm(2 * tokens * heads * attention.v_head_dim * hidden)]


def _core(sizes: Sizes) -> AttentionCore:
    """The core at the mean of its FLOPs over layers: some see a window only."""
    model, layers = sizes.model, range(sizes.model.num_layers)
    counts = {"tokens": sizes.tokens, "seq_len": sizes.seq_len}
    flops = sum(attention_core_flops(model, layer, **counts, causal=False) for layer in layers)
    padding = sum(core_padding_flops(model, layer, **counts) for layer in layers)
    shares = model.num_layers * sizes.tp
    return AttentionCore(flops / shares, sizes.seq_len, model.attention.query_key_dim, padding / shares)


def attention_work(sizes: Sizes) -> list[Work]:
    """Norm, the block inside, and residual."""
    stream = sizes.stream * sizes.model.hidden_size
    return [Stream("norm", stream), *attention_inside(sizes.model.attention, sizes), Stream("residual", stream)]


def moe_work(sizes: Sizes) -> list[Work]:
    """Norm, router, permutations, routed and shared experts and residual of one MoE block, on the busiest rank."""
    moe, hidden, stream = sizes.model.moe, sizes.model.hidden_size, sizes.stream
    rows, arriving, width = sizes.rows, sizes.arriving, moe.expert_width / sizes.etp
    # Rows are put in the order of their destination and back; those that arrive for several experts are sorted as well.
    sorted_here = (sizes.local_experts > 1) & (sizes.ep > 1)
    work: list[Work] = [
        Stream("norm", stream * hidden),
        Gemm(2 * stream * hidden * moe.num_experts),
        Stream("router", rows),
        Stream("permute", rows * hidden, count=2),
        Stream("permute", arriving * hidden, count=2 * sorted_here),
        *expert_work(sizes),
        Cast(arriving * (hidden + width), arriving * ((moe.expert_matrices - 1) * width + hidden)),
        Stream("swiglu", arriving * width),
        Stream("combine", rows * hidden),
        Stream("residual", stream * hidden),
    ]
    if moe.expert_bias:
        inner = (moe.expert_matrices - 1) * width
        work += [Stream("residual", arriving * inner), Stream("residual", arriving * hidden)]
    if moe.swiglu_limit:
        work.append(Stream("swiglu", arriving * width))  # clamping gate and up is one more pass over both
    return work + shared_work(sizes)


def shared_work(sizes: Sizes) -> list[Work]:
    """The shared experts of one MoE block, with their gate and residual."""
    moe, stream = sizes.model.moe, sizes.stream * sizes.model.hidden_size
    if not moe.shared_width:
        return []
    work = [*_mlp(sizes, moe.shared_width, moe.expert_matrices), Stream("residual", stream)]
    return work + [Gemm(2 * stream), Stream("swiglu", stream)] * moe.shared_gate


def expert_work(sizes: Sizes) -> list[GroupedGemm]:
    """The two grouped products of the routed experts; gate and up are one product of twice the width."""
    moe, hidden, width = sizes.model.moe, sizes.model.hidden_size, sizes.model.moe.expert_width / sizes.etp
    rows_per_expert = sizes.arriving / sizes.local_experts
    flops = 2 * sizes.arriving * hidden * width
    return [
        GroupedGemm(matrices * flops, rows_per_expert, moe.expert_width / sizes.etp)
        for matrices in (moe.expert_matrices - 1, 1)
    ]


def dense_work(sizes: Sizes) -> list[Work]:
    """Norm, SwiGLU MLP and residual of one dense feed-forward block."""
    model, stream = sizes.model, sizes.stream * sizes.model.hidden_size
    return [Stream("norm", stream), *_mlp(sizes, model.dense_width, model.dense_matrices), Stream("residual", stream)]


def _mlp(sizes: Sizes, width: int, matrices: int) -> list[Work]:
    tokens, hidden, width = sizes.tokens, sizes.model.hidden_size, width / sizes.tp
    return [
        Gemm(2 * tokens * hidden * (matrices - 1) * width),  # gate and up are one product
        Cast(tokens * (hidden + width), tokens * ((matrices - 1) * width + hidden)),
        Stream("swiglu", tokens * width),
        Gemm(2 * tokens * width * hidden),
    ]


def embedding_work(sizes: Sizes) -> list[Work]:
    return [Stream("permute", sizes.stream * sizes.model.hidden_size)]


def head_work(sizes: Sizes) -> list[Work]:
    """Final norm, output projection and cross-entropy, the vocabulary divided over tp."""
    hidden, vocabulary = sizes.model.hidden_size, -(-sizes.model.vocab_size // sizes.tp)
    return [
        Stream("norm", sizes.stream * hidden),
        Gemm(2 * sizes.tokens * hidden * vocabulary),
        Stream("loss", sizes.tokens * vocabulary),
    ]


def join_work(sizes: Sizes) -> list[Work]:
    """Before a layer of multi-token prediction: tokens embedded and beside the state, two norms, one projection."""
    stream = sizes.stream * sizes.model.hidden_size
    return [
        *embedding_work(sizes),
        Stream("norm", stream, count=2),
        Stream("permute", 2 * stream),
        Gemm(join_forward_flops(sizes.model, sizes.stream)),
    ]


def rebuilt_work(sizes: Sizes, recompute: Recompute) -> list[tuple[Any, list[Work], list[Work]]]:
    """(mask, work of a MoE layer, work of a dense layer) that selective recomputation repeats, module by module."""
    model, moe = sizes.model, sizes.model.moe
    stream, arriving = sizes.stream * model.hidden_size, sizes.arriving * moe.expert_width / sizes.etp
    inside = attention_inside(model.attention, sizes)[:-1]  # all but the output projection
    norms: list[Work] = [Stream("norm", stream, count=2)]
    activation: list[Work] = [Stream("swiglu", arriving)]
    shared = _mlp(sizes, moe.shared_width, moe.expert_matrices)[:-1] if moe.shared_width else []
    return [
        (recompute.norm, norms, norms),
        (recompute.attention, inside, inside),
        (recompute.moe_act | recompute.experts, activation, []),
        (recompute.experts, [expert_work(sizes)[0]], []),
        (recompute.shared_experts, shared, []),
        (recompute.dense_mlp, [], _mlp(sizes, model.dense_width, model.dense_matrices)[:-1]),
    ]


def total_seconds(works: Sequence[Work], device: Device, precision: Precision) -> Seconds:
    """The seconds of operations in turn."""
    nothing = Seconds(0.0, 0.0, 0.0)
    return sum((seconds(work, device, precision) for work in works), nothing)


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Seconds of one micro-batch in every part of a stage, as `StageShapes` counts them."""

    moe_layers: Seconds
    dense_layers: Seconds
    has_embedding: Seconds
    has_head: Seconds
    predictions: Seconds


def layer_seconds(device: Device, precision: Precision, sizes: Sizes, recompute: Recompute) -> LayerSeconds:
    """What each part costs, recomputation included in its input gradient; arrays (rows,). No communication."""
    attention = total_seconds(attention_work(sizes), device, precision)
    # Of a layer's operations in turn, beyond the curves of repeated ones.
    fixed = Seconds(device.layer_forward_seconds, device.layer_backward_seconds, 0.0)
    rebuilt = [
        (mask, total_seconds(moe, device, precision), total_seconds(dense, device, precision))
        for mask, moe, dense in rebuilt_work(sizes, recompute)
    ]

    def layer(work: list[Work], kind: int) -> Seconds:
        once = _issued(attention + total_seconds(work, device, precision), device.issue_seconds) + fixed
        again = once.forward * recompute.full + sum(each[0] * each[kind].forward for each in rebuilt)
        return Seconds(once.forward, once.input_grad + again, once.weight_grad)

    head = total_seconds(head_work(sizes), device, precision)
    return LayerSeconds(
        moe_layers=layer(moe_work(sizes), 1),
        dense_layers=layer(dense_work(sizes), 2),
        has_embedding=total_seconds(embedding_work(sizes), device, precision),
        has_head=head,
        predictions=layer([*join_work(sizes), *moe_work(sizes)], 1) + head,
    )


def _issued(computed: Seconds, issue_seconds: float) -> Seconds:
    """A layer's direction lasts at least as long as the host takes to issue it; the weight gradients fill up."""
    whole = computed.input_grad + computed.weight_grad
    weight_grad = computed.weight_grad + np.maximum(issue_seconds - whole, 0.0)
    return Seconds(np.maximum(computed.forward, issue_seconds), computed.input_grad, weight_grad)


def stage_seconds(layers: LayerSeconds, shapes: StageShapes) -> Seconds:
    """Compute seconds of one micro-batch on every stage: arrays (rows, stages)."""

    def total(name: str) -> Any:
        return sum(
            np.asarray(getattr(getattr(layers, part.name), name))[..., None] * getattr(shapes, part.name)
            for part in fields(LayerSeconds)
        )

    return Seconds(*(total(each.name) for each in fields(Seconds)))


def stage_flops(
    model: ModelSpec,
    layers: Sequence[int],
    *,
    is_last: bool,
    tokens,
    seq_len,
    full,
    modules: Collection[RecomputeModule] = (),
    routed_rows=None,
) -> Any:
    """FLOPs that one rank executes for one micro-batch on a stage: forward, backward and recompute, full attention.

    Backward takes twice the forward; `full` recompute repeats the forward of the layers but not of the head, selective
    the inner products of `modules`. `routed_rows` are those that the rank's experts compute.
    """

    def executed(layer: int) -> Any:
        counts = {"tokens": tokens, "seq_len": seq_len, "causal": False, "routed_rows": routed_rows}
        once = layer_forward_flops(model, layer, **counts).total
        return (3 + full) * once + rebuilt_forward_flops(model, layer, modules, **counts)

    body = sum(map(executed, layers))
    if not is_last:
        return body
    # A layer of multi-token prediction is like the last one with experts.
    prediction = (3 + full) * join_forward_flops(model, tokens) + executed(model.moe_layers[-1])
    heads = (1 + model.mtp_layers) * head_forward_flops(model, tokens)
    return body + model.mtp_layers * prediction + 3 * heads

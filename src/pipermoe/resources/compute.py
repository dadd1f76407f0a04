"""What one micro-batch computes on a stage, operation by operation, and how long that takes on a device.

The operations are those that the runtime executes (`runtime/attention.py`, `runtime/experts.py`, `runtime/stage.py`);
their FLOPs add up to `resources.flops`. Arrays broadcast: one entry per strategy, or one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipermoe.resources.flops import attention_core_flops, head_forward_flops, layer_forward_flops
from pipermoe.resources.rates import attention_seconds, gemm_seconds, grouped_gemm_seconds, pass_seconds
from pipermoe.resources.stages import StageShapes
from pipermoe.specs.device import Device, Pass
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.model import GroupedQueryAttention, LatentAttention, ModelSpec
from pipermoe.specs.precision import Precision


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
    """The causal attention core; `flops` is the full square that the kernel is credited with."""

    flops: Any
    seq_len: Any


@dataclass(frozen=True, slots=True)
class Stream:
    """`count` named memory-bound passes over `elements` each."""

    name: Pass
    elements: Any
    count: Any = 1


Work = Gemm | GroupedGemm | AttentionCore | Stream


def seconds(work: Work, device: Device, precision: Precision) -> tuple[Any, Any]:
    """Forward and backward seconds of one operation, alone on the device."""
    match work:
        case Gemm(flops, count):
            forward = count * gemm_seconds(device, precision, flops)
            return forward, 2 * forward
        case GroupedGemm(flops, rows, width):
            forward = grouped_gemm_seconds(device, precision, flops, rows, width)
            return forward, 2 * forward
        case AttentionCore(flops, seq_len):
            return attention_seconds(device, precision, flops, seq_len)
        case Stream(name, elements, count):
            forward, backward = pass_seconds(device, precision, name, elements)
            return count * forward, count * backward


def grouped_query(model: ModelSpec) -> GroupedQueryAttention:
    """The model's attention, if it is of the kind that can be priced. UserError otherwise."""
    if not isinstance(model.attention, GroupedQueryAttention):
        rule = "cannot be priced yet; accepted: gqa"
        raise UserError(describe_value(model.name, "attention.kind", model.attention.kind, rule))
    return model.attention


def attention_work(model: ModelSpec, tokens, seq_len) -> list[Work]:
    """Norm, projections, rotation, core, output projection and residual of one attention block."""
    attention, hidden = model.attention, model.hidden_size
    core = sum(
        attention_core_flops(model, layer, tokens=tokens, seq_len=seq_len, causal=False)
        for layer in range(model.num_layers)
    )
    around: list[Work] = [
        Stream("norm", tokens * hidden),
        AttentionCore(core / model.num_layers, seq_len),  # the mean over layers: some see a window only
        Stream("residual", tokens * hidden),
    ]
    if isinstance(attention, LatentAttention):
        return around + _latent_projections(attention, hidden, tokens)
    return around + _grouped_projections(attention, hidden, tokens)


def _grouped_projections(attention: GroupedQueryAttention, hidden: int, tokens) -> list[Work]:
    query = attention.num_heads * attention.head_dim
    key_value = attention.num_kv_heads * attention.head_dim
    work: list[Work] = [
        Gemm(2 * tokens * hidden * query, count=2),
        Gemm(2 * tokens * hidden * key_value, count=2),
        Stream("rope", tokens * query),
        Stream("rope", tokens * key_value),
    ]
    if attention.qk_norm != "none":
        norm: Pass = "norm" if attention.qk_norm == "full" else "head_norm"
        work += [Stream(norm, tokens * query), Stream(norm, tokens * key_value)]
    return work


def _latent_projections(attention: LatentAttention, hidden: int, tokens) -> list[Work]:
    """Down to the latent vectors, up to every head's query, key and value, and out (DeepSeek-V2, arXiv 2405.04434)."""
    heads, q_rank, kv_rank = attention.num_heads, attention.q_lora_rank, attention.kv_lora_rank
    query, rotated = heads * attention.query_key_dim, attention.qk_rope_head_dim
    work: list[Work] = [
        Gemm(2 * tokens * (q_rank or hidden) * query),
        Gemm(2 * tokens * hidden * (kv_rank + rotated)),
        Stream("norm", tokens * kv_rank),
        Gemm(2 * tokens * kv_rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)),
        Stream("rope", tokens * heads * rotated),
        Stream("rope", tokens * rotated),
        Gemm(2 * tokens * heads * attention.v_head_dim * hidden),
    ]
    if q_rank:
        work += [Gemm(2 * tokens * hidden * q_rank), Stream("norm", tokens * q_rank)]
    return work


def moe_work(model: ModelSpec, tokens, experts_per_rank) -> list[Work]:
    """Norm, router, permutations, routed and shared experts and residual of one MoE block under balanced routing."""
    moe, hidden = model.moe, model.hidden_size
    rows = tokens * moe.top_k
    rows_per_expert = rows / experts_per_rank
    # Rows are put in the order of their destination and back; those that arrive for several experts are sorted as well.
    sorted_here = (experts_per_rank > 1) & (experts_per_rank < moe.num_experts)
    into, out = moe.expert_matrices - 1, 1  # gate and up are one product of twice the width
    work: list[Work] = [
        Stream("norm", tokens * hidden),
        Gemm(2 * tokens * hidden * moe.num_experts),
        Stream("router", tokens * moe.top_k),
        Stream("permute", rows * hidden, count=2 + 2 * sorted_here),
        GroupedGemm(2 * rows * into * hidden * moe.expert_width, rows_per_expert, moe.expert_width),
        Stream("swiglu", rows * moe.expert_width),
        GroupedGemm(2 * rows * out * hidden * moe.expert_width, rows_per_expert, moe.expert_width),
        Stream("combine", rows * hidden),
        Stream("residual", tokens * hidden),
    ]
    if moe.expert_bias:
        work += [Stream("residual", rows * into * moe.expert_width), Stream("residual", rows * hidden)]
    if moe.swiglu_limit:
        work.append(Stream("swiglu", rows * moe.expert_width))  # clamping gate and up is one more pass over both
    if moe.shared_width:
        work += [*_mlp(tokens, hidden, moe.shared_width, moe.expert_matrices), Stream("residual", tokens * hidden)]
        if moe.shared_gate:
            work += [Gemm(2 * tokens * hidden), Stream("swiglu", tokens * hidden)]
    return work


def dense_work(model: ModelSpec, tokens) -> list[Work]:
    """Norm, SwiGLU MLP and residual of one dense feed-forward block."""
    hidden = model.hidden_size
    mlp = _mlp(tokens, hidden, model.dense_width, model.dense_matrices)
    return [Stream("norm", tokens * hidden), *mlp, Stream("residual", tokens * hidden)]


def _mlp(tokens, hidden: int, width: int, matrices: int) -> list[Work]:
    return [
        Gemm(2 * tokens * hidden * (matrices - 1) * width),  # gate and up are one product
        Stream("swiglu", tokens * width),
        Gemm(2 * tokens * width * hidden),
    ]


def embedding_work(model: ModelSpec, tokens) -> list[Work]:
    return [Stream("permute", tokens * model.hidden_size)]


def head_work(model: ModelSpec, tokens) -> list[Work]:
    """Final norm, output projection and cross-entropy."""
    return [
        Stream("norm", tokens * model.hidden_size),
        Gemm(2 * tokens * model.hidden_size * model.vocab_size),
        Stream("loss", tokens * model.vocab_size),
    ]


def _total(works: Sequence[Work], device: Device, precision: Precision) -> tuple[Any, Any]:
    forward, backward = zip(*(seconds(work, device, precision) for work in works), strict=True)
    return sum(forward), sum(backward)


def stage_seconds(
    model: ModelSpec, device: Device, precision: Precision, shapes: StageShapes, tokens, seq_len, experts_per_rank, full
) -> tuple[Any, Any]:
    """Forward and backward compute seconds of one micro-batch on every stage: two arrays (rows, stages).

    `tokens`, `experts_per_rank` and `full` (whether everything but the head is recomputed) are arrays (rows,).
    Communication is not included.
    """
    attention = attention_work(model, tokens, seq_len)
    parts = (
        (shapes.moe_layers, attention + moe_work(model, tokens, experts_per_rank), True),
        (shapes.dense_layers, attention + dense_work(model, tokens), True),
        (shapes.has_embedding, embedding_work(model, tokens), False),
        (shapes.has_head, head_work(model, tokens), False),
    )
    forward = np.zeros((len(tokens), shapes.num_stages))
    backward = np.zeros_like(forward)
    for count, works, recomputed in parts:
        if count.any():
            once, back = _total(works, device, precision)
            if recomputed:  # a layer, which the device cannot finish before the host has issued it
                once, back = np.maximum(once, device.issue_seconds), np.maximum(back, device.issue_seconds)
            forward += once[:, None] * count
            backward += (back + once * (full if recomputed else 0))[:, None] * count
    layers = shapes.moe_layers + shapes.dense_layers
    fixed = device.layer_forward_seconds  # of a layer's operations in turn, beyond the curves of repeated ones
    forward += fixed * layers
    backward += (device.layer_backward_seconds + fixed * full)[:, None] * layers
    return forward, backward


def stage_flops(model: ModelSpec, layers: Sequence[int], *, has_head: bool, tokens, seq_len, full) -> Any:
    """FLOPs that one rank executes for one micro-batch on a stage: forward, backward and recompute, full attention.

    Backward takes twice the forward; `full` recompute repeats the forward of the layers but not of the head.
    """
    repeats = 3 + full
    body = sum(layer_forward_flops(model, n, tokens=tokens, seq_len=seq_len, causal=False).total for n in layers)
    return repeats * body + 3 * has_head * head_forward_flops(model, tokens)

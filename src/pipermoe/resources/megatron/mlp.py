"""Feed-forward blocks: dense, routed experts with router and dispatcher, shared experts.

Sources: Megatron-Core transformer/mlp.py and transformer/moe (router, token_dispatcher, experts, moe_utils,
shared_experts); TransformerEngine pytorch/module/grouped_linear.py, pytorch/permutation.py.

S `job.shard`, T `job.tokens`, d `hidden_size`, E experts, k choices, R `job.rows`.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipermoe.resources.megatron.attention import norm_saved, norm_weights, residual_dropout
from pipermoe.resources.megatron.job import MegatronJob
from pipermoe.resources.megatron.tensors import BF16, BOOL, FP32, INT32, INT64, Module, Saved, Weight


def mlp_modules(job: MegatronJob, *, is_moe: bool) -> tuple[Module, ...]:
    """The modules of one layer's feed-forward block, from the norm before it to the residual dropout."""
    normed = not job.recomputes("layernorm") or not is_moe  # a dense block's norm is fused into its first GEMM
    norm = Module(
        "pre_mlp_layernorm",
        norm_weights(job, "pre_mlp_layernorm"),
        (*norm_saved(job, job.shard, job.model.hidden_size, output=normed), *residual_dropout(job)),
    )
    return (norm, *(_moe(job) if is_moe else (_dense(job),)))


def _dense(job: MegatronJob) -> Module:
    model, tensor = job.model, job.strategy.tensor_parallel
    kept = _activation(job, job.tokens, model.dense_width // tensor, gated=model.dense_matrices == 3)
    weights = _gemms(job, "mlp", model.dense_width // tensor, model.dense_matrices, bias=model.mlp_bias)
    if job.recomputes("mlp"):
        return Module("mlp", weights, backward_extra=sum(tensor.bytes for tensor in kept))
    return Module("mlp", weights, kept)


def _moe(job: MegatronJob) -> Iterator[Module]:
    model, tensor = job.model, job.strategy.tensor_parallel
    moe = model.moe
    yield _router(job)
    if moe.shared_width:
        kept = _activation(job, job.tokens, moe.shared_width // tensor, gated=moe.expert_matrices == 3)
        weights = _gemms(job, "shared_experts", moe.shared_width // tensor, moe.expert_matrices, bias=model.mlp_bias)
        if moe.shared_gate:
            weights += (Weight("shared_experts.gate_weight", (1, model.hidden_size), fused_gradient=False),)
            kept += (Saved.of("output before its gate", job.shard, model.hidden_size),)
        yield Module("mlp.shared_experts", weights, () if job.recomputes("shared_experts") else kept)
    yield Module("mlp.token_dispatcher", saved=tuple(_dispatcher(job)))
    yield _experts(job)


def _router(job: MegatronJob) -> Module:
    """Logits, scores for the auxiliary loss, probabilities: fp32, S x E; the map of choices, boolean."""
    moe = job.model.moe
    table = (job.shard, moe.num_experts)
    return Module(
        "mlp.router",
        (
            Weight("router.weight", (moe.num_experts, job.model.hidden_size), fused_gradient=False),
            *((Weight("router.bias", (moe.num_experts,), fused_gradient=False),) if moe.router.bias else ()),
        ),
        (
            Saved.of("logits", *table, element=FP32),
            Saved.of("scores for the auxiliary loss", *table, element=FP32),
            Saved.of("probabilities", *table, element=FP32),
            Saved.of("routing map", *table, element=BOOL),
        ),
    )


def _dispatcher(job: MegatronJob) -> Iterator[Saved]:
    """Maps of the permutation; the permuted rows themselves are kept by the first expert GEMM."""
    experts, options = job.model.moe.num_experts, job.options
    tokens, columns = job.shard, experts
    if options.moe_dispatcher == "allgather":
        tokens, columns = job.expert_group_tokens, job.local_experts
        yield Saved.of("gathered probabilities", tokens, experts, element=FP32)
    if options.moe_permute_fusion:
        yield Saved.of("row map", tokens, 2 * columns + 1, element=INT32)
    else:
        yield Saved.of("sorted positions", tokens, columns, element=INT64)
        yield Saved.of("token of each row", job.rows, element=INT64)
    yield Saved.of("probability of each row", job.rows, element=FP32)
    if options.index_add:
        returned = job.rows if options.moe_dispatcher == "allgather" else job.sent_rows
        yield Saved.of("returned rows, which index_add keeps", returned, job.model.hidden_size)


def _experts(job: MegatronJob) -> Module:
    """Both grouped GEMMs. The probabilities multiply the activation, so the second GEMM reads weighted rows."""
    model, moe = job.model, job.model.moe
    width, gated = moe.expert_width // job.strategy.expert_tensor_parallel, moe.expert_matrices == 3
    inputs = Saved.of("rows of the experts", job.rows, model.hidden_size)
    inner = _activation(job, job.rows, width, gated=gated, weighted=True)
    kept = inner[:-1] if job.recomputes("moe_act") else inner
    weights = _gemms(
        job, "experts", width, moe.expert_matrices, bias=moe.expert_bias, copies=job.local_experts, routed=True
    )
    rows, first_gradient = inputs.bytes, job.rows * width * (2 if gated else 1) * BF16
    return Module(
        "mlp.experts",
        weights,
        (inputs, *kept),
        forward_extra=_still_named(job, rows) + 2 * rows,  # and the result, and on its way back
        backward_extra=max(2 * rows, first_gradient + rows),
    )


def _still_named(job: MegatronJob, rows: float) -> float:
    """Rows that the layer's forward still refers to while the experts work: as sent, and as they came to be sorted."""
    if job.options.moe_dispatcher == "allgather":
        return 0  # the gathered tokens lie in the gather buffer
    return job.sent_rows * job.model.hidden_size * BF16 + rows * (job.local_experts > 1)


def _gemms(
    job: MegatronJob, name: str, width: int, matrices: int, *, bias: bool, copies: int = 1, routed: bool = False
) -> tuple[Weight, ...]:
    """`linear_fc1` (gate and up in one) and `linear_fc2`."""
    hidden, first = job.model.hidden_size, (matrices - 1) * width
    weights = [
        Weight(f"{name}.linear_fc1.weight", (first, hidden), copies, routed),
        Weight(f"{name}.linear_fc2.weight", (hidden, width), copies, routed),
    ]
    if bias:
        weights += [
            Weight(f"{name}.linear_fc1.bias", (first,), copies, routed, fused_gradient=False),
            Weight(f"{name}.linear_fc2.bias", (hidden,), copies, routed, fused_gradient=False),
        ]
    return tuple(weights)


def _activation(
    job: MegatronJob, tokens: float, width: int, *, gated: bool, weighted: bool = False
) -> tuple[Saved, ...]:
    """What lies between the two GEMMs, the input of the second last.

    SwiGLU is one kernel that keeps its input. GELU keeps its input; multiplied by a probability, also its result.
    """
    first = Saved.of("fc1 output", tokens, width * (2 if gated else 1))
    result = Saved.of("activation", tokens, width)
    if gated and job.options.swiglu_fusion:
        return first, result
    if weighted:
        return first, result, Saved.of("weighted activation", tokens, width)
    return first, result

"""Attention, from the residual stream to its output projection: grouped-query and latent.

Sources: Megatron-Core transformer/attention.py, transformer/multi_latent_attention.py, models/gpt/gpt_layer_specs.py;
TransformerEngine pytorch/module/layernorm_linear.py and linear.py (what `ctx.save_for_backward` gets).

S `job.shard`, T `job.tokens`, d `hidden_size`, h heads of this tensor-parallel rank, s sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipermoe.resources.megatron.job import MegatronJob
from pipermoe.resources.megatron.tensors import BOOL, FP32, Module, Saved, Weight
from pipermoe.specs.model import GroupedQueryAttention, LatentAttention


def attention_modules(job: MegatronJob) -> tuple[Module, ...]:
    """The modules of one layer's attention, its input norm and its residual dropout."""
    attention = job.model.attention
    if isinstance(attention, LatentAttention):
        return (*_latent_projections(job, attention), *_core_and_output(job, attention))
    return (_grouped_projection(job, attention), *_core_and_output(job, attention))


def norm_weights(job: MegatronJob, name: str, width: int = 0) -> tuple[Weight, ...]:
    """Scale, and shift for LayerNorm."""
    width = width or job.model.hidden_size
    parts = ("weight", "bias") if job.model.norm_bias else ("weight",)
    return tuple(Weight(f"{name}.{part}", (width,), fused_gradient=False) for part in parts)


def norm_saved(job: MegatronJob, tokens: int, width: int, *, output: bool) -> Iterator[Saved]:
    """A norm keeps its input and fp32 statistics; its output is kept by the GEMM that reads it."""
    yield Saved.of("norm input", tokens, width)
    yield Saved.of("norm statistics", tokens, 2 if job.model.norm_bias else 1, element=FP32)
    if output:
        yield Saved.of("norm output", tokens, width)


def residual_dropout(job: MegatronJob) -> tuple[Saved, ...]:
    """The mask of bias-dropout-add."""
    if not job.options.hidden_dropout:
        return ()
    return (Saved.of("dropout mask", job.shard, job.model.hidden_size, element=BOOL),)


def _grouped_projection(job: MegatronJob, attention: GroupedQueryAttention) -> Module:
    """`linear_qkv` with its fused norm; queries, keys and values as attention reads them."""
    hidden, tensor = job.model.hidden_size, job.strategy.tensor_parallel
    width = (attention.num_heads + 2 * attention.num_kv_heads) * attention.head_dim // tensor
    normed_heads = (attention.num_heads + attention.num_kv_heads) // tensor * (attention.qk_norm != "none")
    weights = [*norm_weights(job, "linear_qkv.layer_norm"), Weight("linear_qkv.weight", (width, hidden))]
    weights += _vector("linear_qkv.bias", width * attention.qkv_bias)
    weights += _vector("q_layernorm and k_layernorm", 2 * attention.head_dim * (attention.qk_norm == "head"))
    weights += _vector("softmax_offset", attention.num_heads // tensor * attention.sinks)
    return Module(
        "self_attention.linear_qkv",
        tuple(weights),
        (
            *norm_saved(job, job.shard, hidden, output=True),
            Saved.of("query, key, value", job.tokens, width),
            Saved.of("query and key before their norm", job.tokens, normed_heads * attention.head_dim),
            *_rope_tables(job, attention.head_dim),
        ),
    )


def _vector(name: str, length: int) -> tuple[Weight, ...]:
    """A bias or scale of its own; nothing if it has no elements."""
    return (Weight(name, (length,), fused_gradient=False),) if length else ()


def _rope_tables(job: MegatronJob, width: int) -> Iterator[Saved]:
    """Unfused rotation multiplies queries and keys by cosines and sines made anew in every call."""
    if job.options.rotary_tables and not job.options.rope_fusion:
        positions = job.seq_len // job.strategy.context_parallel
        yield Saved.of("rotary cosines and sines of query and key", 4, positions, width)


def _latent_projections(job: MegatronJob, attention: LatentAttention) -> tuple[Module, ...]:
    """Down-projections on every rank, up-projections divided over heads; both norms are fused into the latter."""
    hidden, tensor, shard, tokens = job.model.hidden_size, job.strategy.tensor_parallel, job.shard, job.tokens
    heads = attention.num_heads // tensor
    query_rank, kv_rank = attention.q_lora_rank, attention.kv_lora_rank
    query, key_value = heads * attention.query_key_dim, heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    down = kv_rank + attention.qk_rope_head_dim
    normed = not job.recomputes("layernorm")
    expanded = not job.recomputes("mla_up_proj")
    up_inputs = [*norm_saved(job, shard, kv_rank, output=expanded)]
    weights = [Weight("linear_kv_down_proj.weight", (down, hidden)), *norm_weights(job, "kv_layernorm", kv_rank)]
    weights += _vector("linear_down_proj.bias", (down + query_rank) * attention.bias)
    if query_rank:
        up_inputs += norm_saved(job, shard, query_rank, output=expanded)
        weights += [Weight("linear_q_down_proj.weight", (query_rank, hidden))]
        weights += norm_weights(job, "q_layernorm", query_rank)
    outputs = Saved.of("query, key, value", tokens, heads * (2 * attention.query_key_dim + attention.v_head_dim))
    return (
        Module(
            "input_layernorm",
            norm_weights(job, "input_layernorm"),
            tuple(norm_saved(job, shard, hidden, output=normed)),
        ),
        Module("self_attention.linear_down_proj", tuple(weights), tuple(up_inputs)),
        Module(
            "self_attention.linear_up_proj",
            (
                Weight("linear_q_up_proj.weight", (query, query_rank or hidden)),
                Weight("linear_kv_up_proj.weight", (key_value, kv_rank)),
            ),
            (outputs, *_rope_tables(job, attention.qk_rope_head_dim)) if expanded else (),
            backward_extra=0 if expanded else outputs.bytes,
        ),
    )


def _core_and_output(job: MegatronJob, attention: GroupedQueryAttention | LatentAttention) -> tuple[Module, ...]:
    """The core's own tensors, and its output, which `linear_proj` reads."""
    hidden, heads = job.model.hidden_size, attention.num_heads // job.strategy.tensor_parallel
    width = heads * attention.value_dim
    biased = attention.output_bias if isinstance(attention, GroupedQueryAttention) else attention.bias
    core = tuple(_unfused_core(job, heads) if job.options.attention_core == "unfused" else _fused_core(job, heads))
    kept = () if job.recomputes("core_attn") else core
    gradients = sum(tensor.bytes for tensor in core)  # of the scores and of the probabilities
    return (
        Module("self_attention.core_attention", saved=kept, backward_extra=gradients * (1 if kept else 2)),
        Module(
            "self_attention.linear_proj",
            (Weight("linear_proj.weight", (hidden, width)), *_vector("linear_proj.bias", hidden * biased)),
            (Saved.of("attention output", job.tokens, width), *residual_dropout(job)),
        ),
    )


def _unfused_core(job: MegatronJob, heads: int) -> Iterator[Saved]:
    """Softmax of b h s s scores; with dropout also its mask and its result."""
    batch, length = job.strategy.micro_batch_size, job.seq_len
    scores = (batch * heads, length // job.strategy.context_parallel, length)
    yield Saved.of("attention probabilities", *scores)
    if job.options.attention_dropout:
        yield Saved.of("attention dropout mask", *scores, element=BOOL)
        yield Saved.of("attention probabilities after dropout", *scores)


def _fused_core(job: MegatronJob, heads: int) -> Iterator[Saved]:
    """Log-sum-exp; FlashAttention's output by sequence too, which it copies to the "sbhd" order; cuDNN writes that."""
    yield Saved.of("log-sum-exp", job.tokens, heads, element=FP32)
    if job.options.attention_core == "flash" and job.strategy.micro_batch_size > 1:
        yield Saved.of("attention output by sequence", job.tokens, heads * job.model.attention.value_dim)

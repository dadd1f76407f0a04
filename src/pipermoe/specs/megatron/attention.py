"""Attention <-> Megatron-LM arguments: grouped queries or latent attention, norms, windows, rotary positions."""

from __future__ import annotations

from collections.abc import Iterator

from pipermoe.specs.megatron.arguments import Arguments
from pipermoe.specs.megatron.options import Value
from pipermoe.specs.megatron.patterns import write_flags
from pipermoe.specs.megatron.table import GROUPED_QUERY, LATENT, Tree, read_rows, write_rows
from pipermoe.specs.model import Attention, GroupedQueryAttention, ModelSpec, Yarn

# Megatron's latent attention fixes these (megatron.core.transformer.transformer_config.MLATransformerConfig).
LATENT_YARN = {"original_positions": 4096, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def write_attention(model: ModelSpec) -> dict[str, Value]:
    attention = model.attention
    arguments: dict[str, Value] = {"rotary_base": round(attention.rope_theta)}
    if attention.kind == "mla":
        arguments |= {"multi_latent_attention": True, "qk_layernorm": True, "position_embedding_type": "rope"}
        arguments |= write_rows(LATENT, attention) | _write_latent_yarn(attention.yarn)
    else:
        arguments |= write_rows(GROUPED_QUERY, attention) | {
            "kv_channels": attention.head_dim,
            "group_query_attention": attention.num_kv_heads < attention.num_heads,
            "num_query_groups": attention.num_kv_heads if attention.num_kv_heads < attention.num_heads else None,
            "qk_layernorm": attention.qk_norm == "head",
            "qk_l2_norm": attention.qk_norm == "l2",
            "add_qkv_bias": attention.qkv_bias and not attention.output_bias,
            "rotary_percent": attention.rotated / attention.head_dim,
        }
        arguments |= _write_yarn(attention.yarn)
    if local := model.local_attention:
        sees_window = [int(model.is_local(layer)) for layer in range(model.num_layers)]
        arguments |= {"window_size": f"{local.size - 1},0", "window_attn_skip_freq": write_flags(sees_window)}
    return arguments


def read_attention(arguments: Arguments) -> Tree:
    """The attention record that `arguments` describe, not validated yet."""
    tree: Tree = {"rope_theta": float(arguments["rotary_base"]), "yarn": _read_yarn(arguments)}
    if arguments["multi_latent_attention"]:
        return tree | read_rows(LATENT, arguments) | {"kind": "mla", "bias": arguments["add_bias_linear"]}
    heads = arguments["num_attention_heads"]
    head_dim = arguments["kv_channels"] or (arguments["hidden_size"] // heads if heads else None)
    rotated = round(head_dim * arguments["rotary_percent"]) if head_dim else 0
    norm = "l2" if arguments["qk_l2_norm"] else "head" if arguments["qk_layernorm"] else "none"
    return (
        tree
        | read_rows(GROUPED_QUERY, arguments)
        | {
            "kind": "gqa",
            "num_kv_heads": arguments["num_query_groups"] if arguments["group_query_attention"] else heads,
            "head_dim": head_dim,
            "rotary_dim": 0 if rotated == head_dim else rotated,
            "qkv_bias": arguments["add_bias_linear"] or arguments["add_qkv_bias"],
            "output_bias": arguments["add_bias_linear"],
            "qk_norm": norm,
        }
    )


def unsupported_attention(attention: Attention) -> Iterator[tuple[str, object, str]]:
    """(key, value, rule) of everything in `attention` that no Megatron arguments describe."""
    if not attention.rope_theta.is_integer():
        yield "attention.rope_theta", attention.rope_theta, "Megatron's --rotary-base is an integer"
    if attention.rope_stretch:
        yield "attention.rope_stretch", attention.rope_stretch, "of stretched positions yarn alone is exported"
    if isinstance(attention, GroupedQueryAttention):
        if attention.qk_norm == "full":
            yield "attention.qk_norm", "full", "Megatron norms queries and keys head by head"
        if attention.output_bias and not attention.qkv_bias:
            yield "attention.output_bias", True, "Megatron has it only together with qkv_bias"
        return
    if attention.indexer:
        yield "attention.indexer", attention.indexer.top_k, "sparse attention is not exported"
    if attention.yarn:
        for key, value in LATENT_YARN.items():
            if getattr(attention.yarn, key) != value:
                rule = f"Megatron's latent attention has {value}"
                yield f"attention.yarn.{key}", getattr(attention.yarn, key), rule


def _write_yarn(yarn: Yarn | None) -> dict[str, Value]:
    if yarn is None:
        return {"position_embedding_type": "rope"}
    return {
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": yarn.factor,
        "yarn_original_max_position_embeddings": yarn.original_positions,
        "yarn_beta_fast": yarn.beta_fast,
        "yarn_beta_slow": yarn.beta_slow,
        "yarn_correction_range_round_to_int": yarn.truncate,
    }


def _write_latent_yarn(yarn: Yarn | None) -> dict[str, Value]:
    if yarn is None:
        return {"rope_type": "rope"}
    scales: dict[str, Value] = {"mscale": yarn.mscale or 1.0, "mscale_all_dim": yarn.mscale_all_dim}
    return {"rope_type": "yarn", "rotary_scaling_factor": yarn.factor} | scales


def _read_yarn(arguments: Arguments) -> Tree | None:
    factor = arguments["rotary_scaling_factor"]
    if arguments["multi_latent_attention"]:
        if arguments["rope_type"] == "rope" or factor == 1.0:
            return None
        scales = {"mscale": arguments["mscale"], "mscale_all_dim": arguments["mscale_all_dim"]}
        return {"factor": factor, **LATENT_YARN, **scales}
    if arguments["position_embedding_type"] != "yarn":
        return None
    return {
        "factor": factor,
        "original_positions": arguments["yarn_original_max_position_embeddings"] or 4096,
        "beta_fast": arguments["yarn_beta_fast"] or 32.0,
        "beta_slow": arguments["yarn_beta_slow"] or 1.0,
        "truncate": arguments["yarn_correction_range_round_to_int"] is not False,
    }

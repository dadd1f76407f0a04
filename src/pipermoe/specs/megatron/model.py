"""ModelSpec <-> Megatron-LM arguments.

What one argument says alone is a row of `table.MODEL`; here is what takes several arguments on either side.
Source of the meanings: megatron.training.arguments and megatron.core.transformer of megatron-core 0.19.2.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipermoe.specs.documents import validate
from pipermoe.specs.megatron.arguments import Arguments
from pipermoe.specs.megatron.attention import read_attention, unsupported_attention, write_attention
from pipermoe.specs.megatron.options import Value
from pipermoe.specs.megatron.patterns import read_flags, write_flags
from pipermoe.specs.megatron.table import MODEL, Tree, put, read_rows, write_rows
from pipermoe.specs.model import ModelSpec

# gpt-oss: x * sigmoid(1.702 x) times (linear half + 1), both halves clamped.
GPT_OSS_ACTIVATION: dict[str, Value] = {"quick_geglu": True, "glu_linear_offset": 1.0}


def write_model(model: ModelSpec) -> dict[str, Value]:
    """The arguments that describe `model`, which `unsupported_parts` has no objection to."""
    moe, router = model.moe, model.moe.router
    arguments = write_rows(MODEL, model) | {
        "padded_vocab_size": model.vocab_size,
        "moe_ffn_hidden_size": moe.expert_width,
        "moe_layer_freq": write_flags([int(model.is_moe(layer)) for layer in range(model.num_layers)]),
        "ffn_hidden_size": model.dense_width if model.dense_layers else moe.expert_width,
        "add_bias_linear": has_biases(model),
        # Without it softmax is taken over the chosen logits, which is softmax over all, normalised over the chosen.
        "moe_router_pre_softmax": router.score == "softmax" and not router.normalize_top_k,
        "moe_router_dtype": "fp32",
    }
    if model.mtp_layers:
        arguments["mtp_num_layers"] = model.mtp_layers
    if moe.swiglu_limit:
        arguments |= {"activation_func_clamp_value": moe.swiglu_limit, **GPT_OSS_ACTIVATION}
    else:
        arguments["swiglu"] = moe.expert_matrices == 3
    return arguments | write_attention(model)


def read_model(arguments: Arguments, name: str = "megatron") -> ModelSpec:
    """The model that `arguments` describe. UserError where they describe none."""
    tree = read_rows(MODEL, arguments)
    num_layers = arguments["num_layers"] or 0
    width = arguments["ffn_hidden_size"] or _default_width(arguments)
    is_moe = []
    if arguments["num_experts"]:
        is_moe = read_flags(arguments["moe_layer_freq"], num_layers, "--moe-layer-freq", first=0)
    bias = arguments["add_bias_linear"]
    gated = bool(arguments["swiglu"] or arguments["quick_geglu"])
    put(tree, "name", name)
    put(tree, "vocab_size", _vocabulary(arguments))
    put(tree, "attention", read_attention(arguments))
    put(tree, "moe.expert_width", arguments["moe_ffn_hidden_size"] or width)
    put(tree, "moe.expert_matrices", 3 if gated else 2)
    put(tree, "moe.expert_bias", bias)
    put(tree, "moe.router.bias", bias)
    if arguments["moe_router_score_function"] == "softmax":
        put(tree, "moe.router.normalize_top_k", not arguments["moe_router_pre_softmax"])
    if arguments["activation_func_clamp_value"]:
        put(tree, "moe.swiglu_limit", arguments["activation_func_clamp_value"])
    if dense := [layer for layer, flag in enumerate(is_moe) if not flag]:
        tree |= {"dense_layers": dense, "dense_width": width, "dense_matrices": 3 if gated else 2}
    put(tree, "mlp_bias", bias and bool(dense or arguments["moe_shared_expert_intermediate_size"]))
    put(tree, "mtp_layers", arguments["mtp_num_layers"] or 0)
    if window := _window(arguments, num_layers):
        put(tree, "local_attention", window)
    return validate(tree, ModelSpec, where="Megatron arguments")


def unsupported_parts(model: ModelSpec) -> Iterator[tuple[str, object, str]]:
    """(key, value, rule) of everything in `model` that no Megatron arguments describe."""
    moe, router = model.moe, model.moe.router
    if model.norms_per_layer != 2:
        yield "norms_per_layer", model.norms_per_layer, "Megatron's layers have 2"
    if model.no_rope_layers:
        yield "no_rope_layers", list(model.no_rope_layers), "layers without positions are not exported"
    if model.head_bias:
        yield "head_bias", True, "Megatron's head has no bias"
    if router.score == "sigmoid" and not router.normalize_top_k and moe.top_k > 1:
        yield "moe.router.normalize_top_k", False, "Megatron normalises sigmoid scores over the chosen experts"
    if router.correction_bias == "parameter":
        yield "moe.router.correction_bias", "parameter", "Megatron's expert bias is a buffer"
    if router.correction_bias != "none" and router.score != "sigmoid":
        yield "moe.router.correction_bias", router.correction_bias, "Megatron has expert bias with sigmoid scores only"
    if model.dense_layers and model.dense_matrices != moe.expert_matrices:
        yield "dense_matrices", model.dense_matrices, f"must equal moe.expert_matrices = {moe.expert_matrices}"
    if has_biases(model) and not _has_all_biases(model):
        yield "mlp_bias", model.mlp_bias, "Megatron has biases on all linear layers (and the router) or on none"
    if has_biases(model) and moe.shared_width:
        yield "moe.shared_width", moe.shared_width, "Megatron's shared experts have no biases"
    if model.local_attention and model.local_attention.kind == "chunked":
        yield "local_attention.kind", "chunked", "Megatron has sliding windows only"
    yield from unsupported_attention(model.attention)


def has_biases(model: ModelSpec) -> bool:
    """Whether linear layers other than the query, key and value projections have biases."""
    return model.mlp_bias or model.moe.expert_bias or model.moe.router.bias or _output_bias(model)


def _has_all_biases(model: ModelSpec) -> bool:
    needs_mlp = bool(model.dense_layers or model.moe.shared_width)
    others = model.moe.expert_bias and model.moe.router.bias and _output_bias(model)
    return others and (model.mlp_bias or not needs_mlp)


def _output_bias(model: ModelSpec) -> bool:
    return model.attention.output_bias if model.attention.kind == "gqa" else model.attention.bias


def _default_width(arguments: Arguments) -> int:
    """Megatron's feed-forward width where none is given: 4 d, or 8/3 d in multiples of 64 for SwiGLU."""
    hidden = arguments["hidden_size"] or 0
    return int(4 * hidden * 2 / 3 / 64) * 64 if arguments["swiglu"] else 4 * hidden


def _vocabulary(arguments: Arguments) -> int | None:
    """Rows of the embedding over all tensor-parallel ranks, padded as Megatron pads them."""
    if arguments["padded_vocab_size"] or not arguments["vocab_size"]:
        return arguments["padded_vocab_size"]
    multiple = arguments["make_vocab_size_divisible_by"] * arguments["tensor_model_parallel_size"]
    return -(-arguments["vocab_size"] // multiple) * multiple


def _window(arguments: Arguments, num_layers: int) -> Tree | None:
    if not arguments["window_size"]:
        return None
    before = int(arguments["window_size"].strip("()[] ").split(",")[0])  # keys before the query
    skip = arguments["window_attn_skip_freq"]
    if skip is None:
        local = [1] * num_layers
    else:
        local = read_flags(skip, num_layers, "--window-attn-skip-freq", first=-1)
        if skip.isdigit():  # every N-th layer is the one that sees everything
            local = [1 - flag for flag in local]
    layers = [layer for layer, flag in enumerate(local) if flag]
    return {"kind": "sliding", "size": before + 1, "layers": layers}

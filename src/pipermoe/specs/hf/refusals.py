"""What cannot be priced yet, by name and with the reason: a refusal, never a guess."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipermoe.specs.errors import UserError, describe_value

_MAMBA = "has Mamba (state-space) layers, which are not priced yet"
_LINEAR = "has linear-attention layers, which are not priced yet"
_CONVOLUTION = "has convolution layers, which are not priced yet"
_ENCODER = "is an encoder-decoder model; only decoders are priced"

REFUSED_TYPES: dict[str, str] = {
    "bamba": _MAMBA,
    "granitemoehybrid": _MAMBA,
    "jamba": _MAMBA,
    "nemotron_h": _MAMBA,
    "zamba": _MAMBA,
    "zamba2": _MAMBA,
    "bailing_moe_linear": _LINEAR,
    "kimi_linear": _LINEAR,
    "kimi_k3": _LINEAR,
    "minimax": _LINEAR,
    "minimax_text_01": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen3_5_moe": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "lfm2_moe": _CONVOLUTION,
    "deepseek_v4": "routes by hash in its first layers and mixes residual streams, which are not priced yet",
    "longcat_flash": "has zero-computation experts and two attention blocks per layer, which are not priced yet",
    "minimax_m3": "attends to selected blocks of keys, which is not priced yet",
    "mimo_v2_flash": "changes its attention heads from layer to layer, which is not priced yet",
    "gemma4": "changes its attention heads from layer to layer, which is not priced yet",
    "gemma4_text": "changes its attention heads from layer to layer, which is not priced yet",
    "jetmoe": "routes its attention heads as experts, which is not priced yet",
    "switch_transformers": _ENCODER,
    "nllb-moe": _ENCODER,
}

REFUSED_KEYS: dict[str, str] = {
    "mamba_d_state": _MAMBA,
    "mamba_num_heads": _MAMBA,
    "ssm_state_size": _MAMBA,
    "hybrid_override_pattern": _MAMBA,
    "layers_block_type": _MAMBA,
    "attn_layer_period": _MAMBA,
    "linear_attn_config": _LINEAR,
    "linear_num_value_heads": _LINEAR,
    "conv_L_cache": _CONVOLUTION,
    "num_hash_layers": "routes by hash, which is not priced yet",
    "zero_expert_num": "has zero-computation experts, which are not priced yet",
    "moe_latent_size": "has experts in a latent space, which are not priced yet",
    "hc_mult": "mixes several residual streams, which is not priced yet",
    "sparse_attention_config": "attends to selected blocks of keys, which is not priced yet",
    "hybrid_layer_pattern": "changes its attention heads from layer to layer, which is not priced yet",
    "num_kv_shared_layers": "shares keys and values between layers, which is not priced yet",
    "is_encoder_decoder": _ENCODER,
    "use_cla": "shares keys and values between layers, which is not priced yet",
}

PRICED_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "indexed_attention")


def refuse_what_cannot_be_priced(config: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` naming the first key whose meaning the resource model does not hold."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in REFUSED_TYPES:
        raise UserError(describe_value(where, "model_type", model_type, REFUSED_TYPES[model_type]))
    for key, reason in REFUSED_KEYS.items():
        if config.get(key):
            value = config[key] if len(repr(config[key])) <= 80 else "..."
            raise UserError(describe_value(where, key, value, reason))
    attention_types = config.get("attn_type_list")  # MiniMax: 1 is softmax attention, 0 linear attention
    if isinstance(attention_types, list) and 0 in attention_types:
        raise UserError(describe_value(where, "attn_type_list", 0, _LINEAR))
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list):
        for kind in layer_types:
            if kind not in PRICED_LAYER_TYPES:
                rule = f"is not priced yet; priced are {', '.join(PRICED_LAYER_TYPES)}"
                raise UserError(describe_value(where, "layer_types", kind, rule))

"""Tiny models of every family whose weights are known by name, and numbers for them that follow from the names.

Imported where only torch is installed too: by data/make_hf_references.py, beside transformers.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

SEQUENCES, SEQ_LEN, VOCABULARY = 2, 8, 23
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50.0,
    "tie_word_embeddings": False,
}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 20,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "n_group": 4,
    "topk_group": 2,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 1.5,
        "beta_slow": 0.5,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**_COMMON, "intermediate_size": 12, "num_local_experts": 4, "sliding_window": 3},
    "qwen2_moe": {
        **_COMMON,
        "num_experts": 4,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 8,
        "intermediate_size": 20,
        "norm_topk_prob": False,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        **_COMMON,
        "num_experts": 4,
        "moe_intermediate_size": 12,
        "intermediate_size": 20,
        "head_dim": 6,
        "norm_topk_prob": True,
    },
    "olmoe": {**_COMMON, "num_experts": 4, "intermediate_size": 12, "norm_topk_prob": False, "eos_token_id": 1},
    "deepseek_v2": {
        **_COMMON,
        **_DEEPSEEK,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
    },
    "deepseek_v3": {**_COMMON, **_DEEPSEEK, "q_lora_rank": 6, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    "gpt_oss": {
        **_COMMON,
        "num_local_experts": 4,
        "intermediate_size": 12,
        "head_dim": 6,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 0.4,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 1.5,
            "beta_slow": 0.5,
            "truncate": False,
        },
    },
}
for _model_type, _config in CONFIGS.items():
    _config["model_type"] = _model_type


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of this name: around 1 for the weights of norms, around 0 for all others."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    drawn = torch.empty(shape).normal_(0.0, 0.3, generator=torch.Generator().manual_seed(seed))
    return drawn + 1 if name.endswith("norm.weight") else drawn


def tokens() -> Tensor:
    """(sequences, positions + 1): each position but the last predicts the next."""
    s, b = torch.arange(SEQ_LEN + 1), torch.arange(SEQUENCES)[:, None]
    return (s * s + 7 * s + 13 * b) % VOCABULARY


def along(name: str, gradient: Tensor) -> list[float]:
    """Two numbers that tell a gradient from others: its norm, and its product with a direction that the name gives."""
    direction = numbers(f"direction of {name}", tuple(gradient.shape))
    return [gradient.norm().item(), (gradient * direction).sum().item()]

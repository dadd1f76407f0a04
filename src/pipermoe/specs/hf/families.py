"""Which keys of a `config.json` mean what, for every family that is understood: one function each.

A flag that the file leaves out has the default of the family's class in transformers; a size has none. Counts are
checked against those classes on the meta device (tests/specs/hf).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipermoe.specs.hf import layers
from pipermoe.specs.hf.attention import grouped_query, latent, local, rope_theta, sliding_everywhere
from pipermoe.specs.hf.experts import experts, grouped_router
from pipermoe.specs.hf.reader import ConfigReader
from pipermoe.specs.model import Attention, GroupedQueryAttention, MixtureOfExperts, Router

Fields = dict[str, Any]


def _decoder(config: ConfigReader, attention: Attention, moe: MixtureOfExperts, **more: Any) -> Fields:
    """The fields of a ModelSpec that all but DBRX spell alike; `more` wins."""
    return {
        "vocab_size": config.size("vocab_size"),
        "hidden_size": config.size("hidden_size"),
        "num_layers": layers.count(config),
        "attention": attention,
        "moe": moe,
        "norm_epsilon": config.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": config.flag("tie_word_embeddings", False),
    } | more


def mixtral(config: ConfigReader) -> Fields:
    """Mixtral: `intermediate_size` is the expert width."""
    moe = experts(config, Router(normalize_top_k=True), count="num_local_experts")
    window = sliding_everywhere(config, layers.count(config))
    return _decoder(config, grouped_query(config), moe, local_attention=window)


def phimoe(config: ConfigReader) -> Fields:
    """Phi-3.5-MoE: Mixtral with biases and LayerNorm; its sparse mixer weights each choice by its own softmax."""
    fields = mixtral(config)
    moe = fields["moe"].model_copy(update={"router": Router(normalize_top_k=False)})
    attention = grouped_query(config, bias=config.flag("attention_bias", False))
    head_bias = config.flag("lm_head_bias", False)
    return fields | {"attention": attention, "moe": moe, "norm_bias": True, "head_bias": head_bias}


def minimax_m2(config: ConfigReader) -> Fields:
    """MiniMax-M2: sigmoid routing and a norm over the whole query and key; its MTP modules are not published."""
    config.require("use_qk_norm", True, "must be true: the family always normalises queries and keys")
    config.require("qk_norm_type", "per_layer", "must be per_layer, a norm over all heads together")
    config.require("shared_intermediate_size", 0, "shared experts are not known of this family; 0 is accepted")
    moe = experts(
        config,
        Router(score="sigmoid", correction_bias="buffer" if config.flag("use_routing_bias", True) else "none"),
        count="num_local_experts",
    )
    return _decoder(config, grouped_query(config, qk_norm="full"), moe)


def granitemoe(config: ConfigReader) -> Fields:
    """Granite 3 MoE."""
    moe = experts(config, Router(normalize_top_k=True), count="num_local_experts")
    return _decoder(config, grouped_query(config, bias=config.flag("attention_bias", False)), moe)


def gpt_oss(config: ConfigReader) -> Fields:
    """gpt-oss: biases everywhere, a learned sink per head, every other layer sees a window."""
    num_layers = layers.count(config)
    kinds = config.per_layer("layer_types", num_layers, ("full_attention", "sliding_attention"))
    if kinds is None:
        kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers)]
    window = config.size("sliding_window", 0, zero=True)
    moe = experts(
        config,
        Router(normalize_top_k=True, bias=True),
        count="num_local_experts",
        expert_bias=True,
        swiglu_limit=config.number("swiglu_limit", 7.0),
    )
    return _decoder(
        config,
        grouped_query(config, bias=config.flag("attention_bias", True), sinks=True),
        moe,
        local_attention=local("sliding", window, [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]),
    )


def olmoe(config: ConfigReader) -> Fields:
    """OLMoE: `intermediate_size` is the expert width; queries and keys are normalised over all heads together."""
    moe = experts(config, Router(normalize_top_k=config.flag("norm_topk_prob", False)), count="num_experts")
    return _decoder(config, grouped_query(config, bias=config.flag("attention_bias", False), qk_norm="full"), moe)


def _qwen(config: ConfigReader, attention: GroupedQueryAttention, shared_width: int) -> Fields:
    num_layers = layers.count(config)
    moe = experts(
        config,
        Router(normalize_top_k=config.flag("norm_topk_prob", False)),
        count="num_local_experts" if config.has("num_local_experts") else "num_experts",  # transformers 5 writes either
        width=config.size("moe_intermediate_size"),
        shared_width=shared_width,
        shared_gate=shared_width > 0,
    )
    dense = layers.sparse_step(config, num_layers)
    return _decoder(config, attention, moe, **_dense(config, dense, "intermediate_size"))


def qwen2_moe(config: ConfigReader) -> Fields:
    """Qwen1.5-MoE, Qwen2-57B-A14B: a gated shared expert; windows, if used, on the even layers."""
    num_layers = layers.count(config)
    fields = _qwen(
        config,
        grouped_query(config, qkv_bias=config.flag("qkv_bias", True)),
        config.size("shared_expert_intermediate_size"),
    )
    if not config.flag("use_sliding_window", False):
        return fields
    kinds = config.per_layer("layer_types", num_layers, ("full_attention", "sliding_attention"))
    below = config.size("max_window_layers", num_layers, zero=True)
    windowed = [
        layer
        for layer in range(num_layers)
        if (kinds[layer] == "sliding_attention" if kinds else layer % 2 == 0 and layer < below)
    ]
    return fields | {"local_attention": local("sliding", config.size("sliding_window"), windowed)}


def qwen3_moe(config: ConfigReader) -> Fields:
    """Qwen3: queries and keys are normalised per head; no shared expert."""
    fields = _qwen(config, grouped_query(config, bias=config.flag("attention_bias", False), qk_norm="head"), 0)
    if config.flag("use_sliding_window", False):
        fields["local_attention"] = sliding_everywhere(config, layers.count(config))
    return fields


def deepseek_v2(config: ConfigReader) -> Fields:
    """DeepSeek-V2 and V2-Lite: softmax routing."""
    router = grouped_router(config, score="softmax", normalize=False, correction_bias=False)
    return _deepseek(config, latent(config), router) | {"mlp_bias": config.flag("mlp_bias", False)}


def deepseek_v3(config: ConfigReader) -> Fields:
    """DeepSeek-V3, R1 and Kimi-K2: sigmoid routing with a correction bias, multi-token prediction."""
    router = grouped_router(config, score="sigmoid", normalize=True, correction_bias=True)
    return _deepseek(config, latent(config), router) | _mtp(config)


def deepseek_v32(config: ConfigReader) -> Fields:
    """DeepSeek-V3.2: V3 with an indexer that picks the keys of every layer."""
    router = grouped_router(config, score="sigmoid", normalize=True, correction_bias=True)
    return _deepseek(config, latent(config, indexer=True), router) | _mtp(config)


def glm_moe_dsa(config: ConfigReader) -> Fields:
    """GLM-5, 5.1: DeepSeek-V3.2's layers under GLM's name."""
    kinds = config.per_layer("indexer_types", layers.count(config), ("full", "shared"))
    if kinds and "shared" in kinds:
        raise config.error("indexer_types", "layers that share an indexer are not priced yet")
    return deepseek_v32(config)


def _deepseek(config: ConfigReader, attention: Attention, router: Router) -> Fields:
    width = config.size("moe_intermediate_size")
    moe = experts(
        config,
        router,
        count="n_routed_experts",
        width=width,
        shared_width=width * config.size("n_shared_experts", 0, zero=True),
    )
    dense = layers.leading(config, layers.count(config))
    return _decoder(config, attention, moe, **_dense(config, dense, "intermediate_size"))


def glm4_moe(config: ConfigReader) -> Fields:
    """GLM-4.5: DeepSeek-V3's experts behind grouped-query attention; only queries, keys and values have biases."""
    attention = grouped_query(
        config,
        qkv_bias=config.flag("attention_bias", False),
        qk_norm="head" if config.flag("use_qk_norm", False) else "none",
        rotary_part=0.5,
    )
    router = grouped_router(config, score="sigmoid", normalize=True, correction_bias=True)
    return _deepseek(config, attention, router) | _mtp(config)


def llama4(config: ConfigReader) -> Fields:
    """Llama 4, text: one implicit shared expert as wide as a routed one; layers with rotary position see chunks."""
    num_layers, width = layers.count(config), config.size("intermediate_size")
    moe = experts(
        config,
        Router(score="sigmoid", normalize_top_k=False),
        count="num_local_experts",
        width=width,
        shared_width=width,
    )
    kinds = config.per_layer("layer_types", num_layers, ("full_attention", "chunked_attention"))
    interval = config.size("no_rope_layer_interval", 4)
    rotary = config.raw("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if not isinstance(rotary, list) or len(rotary) < num_layers or any(item not in (0, 1) for item in rotary):
        raise config.error("no_rope_layers", f"must be a list of 0 or 1 for each of the {num_layers} layers")
    turned = [layer for layer in range(num_layers) if rotary[layer]]  # 1 means with rotary position, despite the key
    chunked = turned if kinds is None else [layer for layer in range(num_layers) if kinds[layer] == "chunked_attention"]
    norm = "l2" if config.flag("use_qk_norm", True) else "none"
    return _decoder(
        config,
        grouped_query(config, bias=config.flag("attention_bias", False), qk_norm=norm),
        moe,
        local_attention=local("chunked", config.size("attention_chunk_size", 0), chunked),
        no_rope_layers=tuple(layer for layer in range(num_layers) if layer not in turned),
        **_dense(config, layers.interleaved(config, num_layers), "intermediate_size_mlp"),
    )


def ernie4_5_moe(config: ConfigReader) -> Fields:
    """ERNIE 4.5: `use_bias` puts a bias on every projection but the experts'; the correction bias is a parameter."""
    bias = config.flag("use_bias", False)
    width = config.uniform_size("moe_intermediate_size")
    moe = experts(
        config,
        Router(normalize_top_k=True, correction_bias="parameter"),
        count="moe_num_experts",
        top_k="moe_k",
        width=width,
        shared_width=width * config.size("moe_num_shared_experts", 0, zero=True),
    )
    return _decoder(
        config,
        grouped_query(config, bias=bias),
        moe,
        mlp_bias=bias,
        head_bias=bias,
        tie_word_embeddings=config.flag("tie_word_embeddings", True),
        **_dense(config, layers.interval(config, layers.count(config)), "intermediate_size"),
    )


def hunyuan_v1_moe(config: ConfigReader) -> Fields:
    """Hunyuan-A13B: one shared expert as wide as a routed one; per-layer lists must agree."""
    width = config.uniform_size("moe_intermediate_size", config.size("intermediate_size"))
    if width != config.size("intermediate_size"):
        raise config.error("moe_intermediate_size", "must equal intermediate_size, as in the published model")
    config.require("use_mixed_mlp_moe", True, "must be true: the family always has a shared expert")
    config.require("moe_layer_num_skipped", 0, "must be 0: every layer of the family is a mixture of experts")
    if config.uniform_size("num_shared_expert", 1) != 1:
        raise config.error("num_shared_expert", "must be 1, as in the published model")
    moe = experts(config, Router(), count="num_experts", top_k="moe_topk", width=width, shared_width=width)
    return _decoder(config, grouped_query(config, bias=config.flag("attention_bias", False), qk_norm="head"), moe)


def dbrx(config: ConfigReader) -> Fields:
    """DBRX: keys of its own in `attn_config` and `ffn_config`; LayerNorm without bias."""
    attention, ffn = config.section("attn_config"), config.section("ffn_config")
    hidden_size, num_heads = config.size("d_model"), config.size("n_heads")
    num_kv_heads = attention.size("kv_n_heads")
    if hidden_size % num_heads:
        raise config.error("n_heads", f"must divide d_model = {hidden_size}")
    if num_heads % num_kv_heads:
        raise attention.error("kv_n_heads", f"must divide n_heads = {num_heads}")
    moe = experts(
        ffn,
        Router(normalize_top_k=ffn.raw("moe_normalize_expert_weights") is not None),
        count="moe_num_experts",
        top_k="moe_top_k",
        width=ffn.size("ffn_hidden_size"),
    )
    return {
        "vocab_size": config.size("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": layers.count(config, "n_layers"),
        "attention": GroupedQueryAttention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=hidden_size // num_heads,
            rope_theta=rope_theta(attention),
        ),
        "moe": moe,
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": config.flag("tie_word_embeddings", False),
    }


def grok_1(config: ConfigReader) -> Fields:
    """Grok-1: a norm before and after each of the two blocks; tied embeddings."""
    moe = experts(config, Router(normalize_top_k=False), count="num_experts")
    tied = config.flag("tie_word_embeddings", True)
    return _decoder(config, grouped_query(config), moe, norms_per_layer=4, tie_word_embeddings=tied)


def arctic(config: ConfigReader) -> Fields:
    """Snowflake Arctic: a dense MLP of the hidden size beside the experts, with a norm of its own."""
    num_layers, hidden_size = layers.count(config), config.size("hidden_size")
    residual = config.flag("parallel_attn_mlp_res", False)
    moe = experts(
        config, Router(normalize_top_k=True), count="num_local_experts", shared_width=hidden_size if residual else 0
    )
    dense = layers.every(config, "moe_layer_frequency", num_layers)
    if dense and residual:
        raise config.error("moe_layer_frequency", "must be 1 with parallel_attn_mlp_res, as in the published model")
    return _decoder(
        config,
        grouped_query(config),
        moe,
        norms_per_layer=3 if residual else 2,
        **_dense(config, dense, "intermediate_size"),
    )


def _dense(config: ConfigReader, dense_layers: tuple[int, ...], width: str) -> Fields:
    """Dense layers and the key of their width, which need not be there when no layer is dense."""
    return {"dense_layers": dense_layers, "dense_width": config.size(width)} if dense_layers else {}


def _mtp(config: ConfigReader) -> Fields:
    modules = config.size("num_nextn_predict_layers", config.size("num_mtp_layers", 0, zero=True), zero=True)
    return {"mtp_layers": modules}


FAMILIES: dict[str, Callable[[ConfigReader], Fields]] = {
    "arctic": arctic,
    "dbrx": dbrx,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v32": deepseek_v32,
    "ernie4_5_moe": ernie4_5_moe,
    "glm4_moe": glm4_moe,
    "glm_moe_dsa": glm_moe_dsa,
    "gpt_oss": gpt_oss,
    "granitemoe": granitemoe,
    "grok-1": grok_1,
    "hunyuan_v1_moe": hunyuan_v1_moe,
    "kimi_k2": deepseek_v3,
    "llama4_text": llama4,
    "minimax_m2": minimax_m2,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "phimoe": phimoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
}

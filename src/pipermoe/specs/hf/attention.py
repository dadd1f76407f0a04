"""The attention block of a config: grouped-query or latent, its biases and norms, and which layers see a window."""

from __future__ import annotations

from typing import Literal

from pipermoe.specs.hf.reader import ConfigReader
from pipermoe.specs.model import GroupedQueryAttention, Indexer, LatentAttention, LocalAttention, Yarn

QkNorm = Literal["none", "head", "full", "l2"]


def grouped_query(
    config: ConfigReader,
    *,
    bias: bool = False,
    qkv_bias: bool = False,
    qk_norm: QkNorm = "none",
    sinks: bool = False,
    rotary_part: float = 1.0,
) -> GroupedQueryAttention:
    """Grouped-query attention in the usual keys; `head_dim` is hidden size over heads unless the config gives it.

    `bias` is on all four projections, `qkv_bias` on those of queries, keys and values. `rotary_part` is the family's
    share of a head that turns with its position, unless the config gives it.
    """
    num_heads = config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.error("num_attention_heads", f"must be a multiple of num_key_value_heads = {num_kv_heads}")
    head_dim = config.size("head_dim", None)
    if head_dim is None:
        hidden_size = config.size("hidden_size")
        if hidden_size % num_heads:
            raise config.error("num_attention_heads", f"must divide hidden_size = {hidden_size}, or give head_dim")
        head_dim = hidden_size // num_heads
    return GroupedQueryAttention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        qkv_bias=bias or qkv_bias,
        output_bias=bias,
        qk_norm=qk_norm,
        sinks=sinks,
        rotary_dim=_rotary_dim(config, head_dim, rotary_part),
        rope_theta=rope_theta(config),
        rope_stretch=rope_stretch(config),
        yarn=yarn(config),
    )


def _rotary_dim(config: ConfigReader, head_dim: int, part: float) -> int:
    """0 if whole heads turn: `rotary_dim`, or a share of the head, which transformers 5 keeps in `rope_parameters`."""
    for reader in (config, *_rope_sections(config)):
        part = reader.number("partial_rotary_factor", part)
    rotary_dim = config.size("rotary_dim", int(head_dim * part))
    if rotary_dim > head_dim:
        raise config.error("rotary_dim", f"must be at most head_dim = {head_dim}")
    return rotary_dim if rotary_dim < head_dim else 0


def latent(config: ConfigReader, *, indexer: bool = False) -> LatentAttention:
    """Multi-head latent attention (DeepSeek); `q_lora_rank` null means a direct query projection."""
    q_lora_rank = config.size("q_lora_rank", 0)
    if indexer and not q_lora_rank:
        raise config.error("q_lora_rank", "must be given: the indexer reads the compressed query")
    return LatentAttention(
        num_heads=config.size("num_attention_heads"),
        q_lora_rank=q_lora_rank,
        kv_lora_rank=config.size("kv_lora_rank"),
        qk_nope_head_dim=config.size("qk_nope_head_dim"),
        qk_rope_head_dim=config.size("qk_rope_head_dim"),
        v_head_dim=config.size("v_head_dim"),
        bias=config.flag("attention_bias", False),
        indexer=_indexer(config) if indexer else None,
        rope_theta=rope_theta(config),
        rope_stretch=rope_stretch(config),
        yarn=yarn(config),
    )


def rope_theta(config: ConfigReader) -> float:
    """The rotary base: a key of its own, or inside `rope_parameters` as transformers 5 writes it."""
    if not config.has("rope_theta") and isinstance(config.raw("rope_parameters"), dict):
        return config.section("rope_parameters").number("rope_theta", 10000.0)
    return config.number("rope_theta", 10000.0)


def yarn(config: ConfigReader) -> Yarn | None:
    """YaRN in `rope_scaling`, or in `rope_parameters` as transformers 5 writes it."""
    for section in _rope_sections(config):
        if "yarn" not in (section.raw("rope_type"), section.raw("type")):
            continue
        factor = section.number("factor")
        if factor < 1:
            raise section.error("factor", "must be at least 1")
        pretrained = section.size("original_max_position_embeddings", None)
        return Yarn(
            factor=factor,
            original_positions=pretrained or config.size("max_position_embeddings"),
            beta_fast=section.number("beta_fast", 32.0),
            beta_slow=section.number("beta_slow", 1.0),
            truncate=section.flag("truncate", True),
            mscale=section.number("mscale", 0.0),
            mscale_all_dim=section.number("mscale_all_dim", 0.0),
        )
    return None


def rope_stretch(config: ConfigReader) -> str:
    """The name of a stretching of rotary positions other than YaRN, "" without one."""
    for section in _rope_sections(config):
        kind = section.raw("rope_type") or section.raw("type")
        if isinstance(kind, str) and kind not in ("default", "yarn"):
            return kind
    return ""


def _rope_sections(config: ConfigReader) -> list[ConfigReader]:
    return [config.section(key) for key in ("rope_parameters", "rope_scaling") if isinstance(config.raw(key), dict)]


def sliding_everywhere(config: ConfigReader, num_layers: int) -> LocalAttention | None:
    """Every layer sees `sliding_window` keys, when the config gives it."""
    window = config.size("sliding_window", 0, zero=True)
    return local("sliding", window, range(num_layers))


def local(kind: Literal["sliding", "chunked"], size: int, layers: range | list[int]) -> LocalAttention | None:
    """Local attention on `layers`; none of them, or no size, is none at all."""
    return LocalAttention(kind=kind, size=size, layers=tuple(layers)) if size and len(layers) else None


def _indexer(config: ConfigReader) -> Indexer:
    return Indexer(
        num_heads=config.size("index_n_heads"),
        head_dim=config.size("index_head_dim"),
        top_k=config.size("index_topk"),
    )

"""ModelSpec: what is trained. Sizes only; how it is counted lives in `resources`, how it is computed in `runtime`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipermoe.specs.base import Frozen

# Bounds that no real model reaches: they turn a slip of the keyboard into an error instead of an endless count, and
# keep every product of sizes that the package forms inside 64 bits.
MAX_WIDTH, MAX_LAYERS, MAX_EXPERTS = 2**24, 4096, 2**16

Width = Annotated[int, Field(strict=True, gt=0, le=MAX_WIDTH)]
OptionalWidth = Annotated[int, Field(strict=True, ge=0, le=MAX_WIDTH)]
Layer = Annotated[int, Field(strict=True, ge=0, lt=MAX_LAYERS)]
Count = Annotated[int, Field(strict=True, gt=0, le=MAX_EXPERTS)]


class Yarn(Frozen):
    """Rotary positions stretched by `factor` beyond the `original_positions` of pre-training (arXiv 2309.00071).

    Pairs that turn more than `beta_fast` times over the original length keep their frequency, those that turn less than
    `beta_slow` times are slowed by `factor`, a ramp between; `truncate` rounds its ends to whole pairs. Logits grow by
    the square of 0.1 ln(factor) + 1, or with both `mscale` given (DeepSeek) of 0.1 mscale_all_dim ln(factor) + 1, of
    which cosines and sines carry the part that `mscale` differs.
    """

    factor: float = Field(ge=1)
    original_positions: Width
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    truncate: bool = True
    mscale: float = Field(default=0.0, ge=0)
    mscale_all_dim: float = Field(default=0.0, ge=0)

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    @property
    def logit_scale(self) -> float:
        """What latent attention's logits are multiplied by on top."""
        return self._growth(self.mscale_all_dim) ** 2

    def _growth(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0


class GroupedQueryAttention(Frozen):
    """Multi-head attention in which `num_heads` (H) query heads share `num_kv_heads` key and value heads.

    `qk_norm` is a learned RMS norm of queries and keys over each "head" or over the "full" projection; "l2" has no
    weights. `sinks` is one learned logit per head that takes attention nowhere (gpt-oss). Of a head the first
    `rotary_dim` numbers turn with their position, all of them if 0. `rope_stretch` names a stretching of positions
    other than YaRN ("longrope"), which is not described further.
    """

    kind: Literal["gqa"] = "gqa"
    num_heads: Width
    num_kv_heads: Width
    head_dim: Width
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "full", "l2"] = "none"
    sinks: bool = False
    rotary_dim: OptionalWidth = 0
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_stretch: str = ""
    yarn: Yarn | None = None

    @property
    def rotated(self) -> int:
        """How many numbers of a head turn with their position."""
        return self.rotary_dim or self.head_dim

    @model_validator(mode="after")
    def _rotation_fits(self) -> GroupedQueryAttention:
        if self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim = {self.rotary_dim} must be at most head_dim = {self.head_dim}")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> GroupedQueryAttention:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}")
        return self

    @property
    def query_key_dim(self) -> int:
        """Length of one head's query and key."""
        return self.head_dim

    @property
    def value_dim(self) -> int:
        """Length of one head's value."""
        return self.head_dim

    @property
    def cache_width(self) -> int:
        """Numbers that a key-value cache keeps for one token of one layer."""
        return 2 * self.num_kv_heads * self.head_dim


class Indexer(Frozen):
    """DeepSeek sparse attention: a light scorer picks the `top_k` keys that the main attention sees (V3.2)."""

    num_heads: Width
    head_dim: Width
    top_k: Width


class LatentAttention(Frozen):
    """Multi-head latent attention (MLA, DeepSeek-V2): keys and values of all heads come from one short vector.

    A query head is `qk_nope_head_dim` numbers without and `qk_rope_head_dim` with rotary position; the key's rotary
    part is shared by all heads. `q_lora_rank = 0`: queries are projected directly (V2-Lite). `bias` is on the
    projections that read or write the hidden state through a rank (query down, key-value down, output).
    """

    kind: Literal["mla"] = "mla"
    num_heads: Width
    q_lora_rank: OptionalWidth = 0
    kv_lora_rank: Width
    qk_nope_head_dim: Width
    qk_rope_head_dim: Width
    v_head_dim: Width
    bias: bool = False
    indexer: Indexer | None = None
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_stretch: str = ""
    yarn: Yarn | None = None

    @property
    def rotated(self) -> int:
        """How many numbers of a head turn with their position."""
        return self.qk_rope_head_dim

    @model_validator(mode="after")
    def _indexer_reads_the_query_rank(self) -> LatentAttention:
        if self.indexer and not self.q_lora_rank:
            raise ValueError("q_lora_rank = 0: an indexer reads the compressed query; give q_lora_rank")
        return self

    @property
    def num_kv_heads(self) -> int:
        """In training every head has its own key and value, expanded from the latent vector."""
        return self.num_heads

    @property
    def query_key_dim(self) -> int:
        """Length of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def value_dim(self) -> int:
        """Length of one head's value."""
        return self.v_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers that a key-value cache keeps for one token of one layer: the latent vector and the shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim + (self.indexer.head_dim if self.indexer else 0)


Attention = Annotated[GroupedQueryAttention | LatentAttention, Field(discriminator="kind")]


class LocalAttention(Frozen):
    """Layers whose queries see only `size` keys: the last ones ("sliding") or those of their own chunk ("chunked")."""

    kind: Literal["sliding", "chunked"]
    size: Width
    layers: tuple[Layer, ...] = Field(min_length=1)


class Router(Frozen):
    """How a token chooses its experts.

    `bias` is added to the logits and learned by gradient. A correction bias enters the choice of experts but not
    their weights and is moved by the balance of load: a "buffer" is not counted as a parameter, a "parameter" is.
    Of `num_groups` groups of experts a token may use `top_k_groups` (device-limited routing, DeepSeek-V2).
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize_top_k: bool = True
    scaling_factor: float = Field(default=1.0, gt=0)
    bias: bool = False
    correction_bias: Literal["none", "buffer", "parameter"] = "none"
    num_groups: Count = 1
    top_k_groups: Count = 1

    @model_validator(mode="after")
    def _enough_groups(self) -> Router:
        if self.top_k_groups > self.num_groups:
            raise ValueError(f"top_k_groups = {self.top_k_groups} must be at most num_groups = {self.num_groups}")
        return self


class MixtureOfExperts(Frozen):
    """The MoE block: `num_experts` (E) routed experts of width `expert_width` (d_ffn), `top_k` (k) for every token.

    `shared_width` is the width of all shared experts together, gated by one more logit if `shared_gate`.
    `expert_matrices` is 3 for gated (SwiGLU) and 2 for plain experts; `expert_bias` adds a bias to each. Above 0,
    `swiglu_limit` clamps both halves of the experts' gated product as gpt-oss does.
    """

    num_experts: Count
    top_k: Count
    expert_width: Width
    shared_width: OptionalWidth = 0
    shared_gate: bool = False
    expert_matrices: Literal[2, 3] = 3
    expert_bias: bool = False
    swiglu_limit: float = Field(default=0.0, ge=0)
    router: Router = Router()

    @model_validator(mode="after")
    def _enough_experts(self) -> MixtureOfExperts:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k = {self.top_k} must be at most num_experts = {self.num_experts}")
        if self.num_experts % self.router.num_groups:
            raise ValueError(
                f"router.num_groups = {self.router.num_groups} must divide num_experts = {self.num_experts}"
            )
        if self.shared_gate and not self.shared_width:
            raise ValueError("shared_gate = true: there is no shared expert to gate; give shared_width")
        return self


class ModelSpec(Frozen):
    """A decoder-only MoE transformer. Symbols of the paper: d = `hidden_size`, L = `num_layers`, V = `vocab_size`.

    The feed-forward block of the layers in `dense_layers` is `dense_matrices` matrices of width `dense_width`;
    `mlp_bias` adds biases to it and to the shared experts. `norm_bias` means LayerNorm with bias instead of RMSNorm.
    `no_rope_layers` know no positions, nor an "l2" norm of queries and keys (Llama 4, whose temperature for them
    is 1 up to position 8190 and is left out). `mtp_layers` are multi-token prediction modules behind the last layer
    (DeepSeek-V3): counted apart, not part of the totals.
    """

    name: str
    source: str = ""
    vocab_size: Width
    hidden_size: Width
    num_layers: Annotated[int, Field(strict=True, gt=0, le=MAX_LAYERS)]
    attention: Attention
    moe: MixtureOfExperts
    local_attention: LocalAttention | None = None
    no_rope_layers: tuple[Layer, ...] = ()
    dense_layers: tuple[Layer, ...] = ()
    dense_width: OptionalWidth = 0
    dense_matrices: Literal[2, 3] = 3
    mlp_bias: bool = False
    norms_per_layer: Annotated[int, Field(strict=True, gt=0, le=8)] = 2
    norm_bias: bool = False
    norm_epsilon: float = Field(default=1e-6, gt=0)
    tie_word_embeddings: bool = False
    head_bias: bool = False
    mtp_layers: Annotated[int, Field(strict=True, ge=0, le=64)] = 0

    @model_validator(mode="after")
    def _layers_exist(self) -> ModelSpec:
        local = self.local_attention.layers if self.local_attention else ()
        for key, layers in (
            ("dense_layers", self.dense_layers),
            ("local_attention.layers", local),
            ("no_rope_layers", self.no_rope_layers),
        ):
            wrong = [layer for layer in layers if layer >= self.num_layers]
            if wrong:
                raise ValueError(f"{key} = {wrong} must be below num_layers = {self.num_layers}")
            if len(set(layers)) < len(layers):
                raise ValueError(f"{key} = {list(layers)} names a layer twice")
        if self.dense_layers and not self.dense_width:
            raise ValueError("dense_width must be given when dense_layers are")
        if len(self.dense_layers) == self.num_layers:
            raise ValueError("dense_layers names every layer; a mixture of experts needs at least one")
        return self

    def is_moe(self, layer: int) -> bool:
        """Whether the feed-forward block of `layer` (0-based) is a mixture of experts."""
        return layer not in self.dense_layers

    def is_local(self, layer: int) -> bool:
        """Whether the attention of `layer` (0-based) sees a window or chunk instead of the whole sequence."""
        return self.local_attention is not None and layer in self.local_attention.layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_layers) if self.is_moe(layer))

    @property
    def prediction_layers(self) -> range:
        """The numbers of the multi-token prediction layers, each of which has experts too."""
        return range(self.num_layers, self.num_layers + self.mtp_layers)

    @property
    def routers(self) -> tuple[int, ...]:
        """The layers that route in training: all with experts, those of multi-token prediction too."""
        return (*self.moe_layers, *self.prediction_layers)

    @property
    def embeds_twice(self) -> bool:
        """Whether the last stage needs the embedding as well as the first one."""
        return self.tie_word_embeddings or self.mtp_layers > 0

    @classmethod
    def from_hf_config(cls, path: str | Path, *, assume: str | None = None) -> ModelSpec:
        """The model of a Hugging Face `config.json` (the file or its folder). Raises `UserError`.

        `assume` names the family to read a config of unknown `model_type` as.
        """
        from pipermoe.specs.hf import read_config  # the importer builds on this module

        return read_config(path, assume=assume)

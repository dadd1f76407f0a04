"""ModelSpec: what is trained. Sizes only; how it is counted lives in `resources`, how it is computed in `runtime`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipermoe.specs.base import Frozen


class GroupedQueryAttention(Frozen):
    """Multi-head attention in which `num_heads` query heads share `num_kv_heads` key and value heads."""

    kind: Literal["gqa"] = "gqa"
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    rope_theta: float = 10000.0

    @model_validator(mode="after")
    def _heads_divide(self) -> GroupedQueryAttention:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} must be a multiple of num_kv_heads = {self.num_kv_heads}")
        return self


class Router(Frozen):
    """How a token chooses its experts."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize_top_k: bool = True
    scaling_factor: float = 1.0
    bias: bool = False


class MixtureOfExperts(Frozen):
    """The MoE block: `num_experts` (E) routed experts of width `expert_width` (d_ffn), `top_k` (k) for every token."""

    num_experts: PositiveInt
    top_k: PositiveInt
    expert_width: PositiveInt
    shared_width: NonNegativeInt = 0
    shared_gate: bool = False
    expert_matrices: Literal[2, 3] = 3
    router: Router = Router()

    @model_validator(mode="after")
    def _enough_experts(self) -> MixtureOfExperts:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k = {self.top_k} must be at most num_experts = {self.num_experts}")
        return self


class ModelSpec(Frozen):
    """A decoder-only MoE transformer. Symbols of the paper: d = `hidden_size`, L = `num_layers`, V = `vocab_size`."""

    name: str
    source: str = ""
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    attention: Annotated[GroupedQueryAttention, Field()]
    moe: MixtureOfExperts
    dense_layers: tuple[NonNegativeInt, ...] = ()
    dense_width: NonNegativeInt = 0
    norm_epsilon: float = 1e-6
    tie_word_embeddings: bool = False

    @model_validator(mode="after")
    def _dense_layers_exist(self) -> ModelSpec:
        wrong = [layer for layer in self.dense_layers if layer >= self.num_layers]
        if wrong:
            raise ValueError(f"dense_layers = {wrong} must be below num_layers = {self.num_layers}")
        if self.dense_layers and not self.dense_width:
            raise ValueError("dense_width must be given when dense_layers are")
        return self

    def is_moe(self, layer: int) -> bool:
        """Whether the feed-forward block of `layer` (0-based) is a mixture of experts."""
        return layer not in self.dense_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_layers) if self.is_moe(layer))

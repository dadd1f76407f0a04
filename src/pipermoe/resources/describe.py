"""A model counted: parameters, FLOPs per token and sizes per token, per component and per kind of layer."""

from __future__ import annotations

from typing import Literal

from pipermoe.resources.activations.layers import dense_layer, moe_layer
from pipermoe.resources.activations.sizes import Recompute, Sizes
from pipermoe.resources.flops import (
    LayerFlops,
    head_forward_flops,
    layer_forward_flops,
    mtp_forward_flops,
    six_n_flops_per_token,
)
from pipermoe.resources.parameters import (
    active_parameters,
    embedding_parameters,
    expert_parameters,
    final_norm_parameters,
    head_parameters,
    layer_parameters,
    mtp_parameters,
    total_parameters,
)
from pipermoe.specs.base import Frozen
from pipermoe.specs.errors import UserError
from pipermoe.specs.model import ModelSpec

Component = Literal[
    "embedding",
    "attention",
    "router",
    "routed_experts",
    "shared_experts",
    "dense_mlp",
    "norms",
    "head",
]
ELEMENT_BYTES = 2  # bf16 and fp16
MAX_SEQ_LEN = 2**30


class ComponentSize(Frozen):
    """One component over all layers: parameters, those that one token meets, and forward FLOPs per token."""

    component: Component
    parameters: int
    active_parameters: int
    forward_flops_causal: float
    forward_flops_full: int


class LayerKind(Frozen):
    """Layers that are alike. `attention` is "full", "sliding 128" or "chunked 8192"; FLOPs are forward, per token.

    `saved_bytes_per_token` is what a layer keeps for its backward pass with fused attention and no recompute.
    """

    layers: tuple[int, ...]
    feed_forward: Literal["experts", "dense"]
    attention: str
    parameters: int
    active_parameters: int
    forward_flops_causal: float
    forward_flops_full: int
    saved_bytes_per_token: int


class FlopsPerToken(Frozen):
    """FLOPs of one token; "causal" counts visible keys, "full" the whole square of the sequence.

    `six_n` is the 6N convention of PaLM and torchtitan: forward and backward, full attention, 6 per active parameter
    but the input embedding.
    """

    forward_causal: float
    forward_full: int
    forward_backward_causal: float
    forward_backward_full: int
    six_n: int


class TokenBytes(Frozen):
    """Bytes of one token in 16 bits: what crosses a stage boundary, what attention caches, what an all-to-all carries.

    `key_value_cache` is over all layers, for a token inside every window; `dispatched` is one direction of one layer;
    `expert_inner` is one layer's expert activations between the matrices; `logits` is 16-bit logits of one position.
    """

    hidden_state: int
    key_value_cache: int
    dispatched: int
    expert_inner: int
    logits: int


class MultiTokenPrediction(Frozen):
    """The modules behind the last layer, apart from all totals; FLOPs are forward, per token."""

    modules: int
    parameters: int
    forward_flops_causal: float
    forward_flops_full: int


class Description(Frozen):
    """What `pipermoe describe` shows. `active_parameters` is per token, the input embedding's table included."""

    name: str
    source: str
    model: ModelSpec
    seq_len: int
    total_parameters: int
    active_parameters: int
    active_parameters_without_embedding: int
    expert_parameters: int
    components: tuple[ComponentSize, ...]
    layers: tuple[LayerKind, ...]
    flops_per_token: FlopsPerToken
    token_bytes: TokenBytes
    multi_token_prediction: MultiTokenPrediction | None = None


def describe_model(model: ModelSpec, *, seq_len: int = 4096) -> Description:
    """Everything that `pipermoe describe` prints, counted at sequences of `seq_len` tokens. Raises `UserError`."""
    if not 1 <= seq_len <= MAX_SEQ_LEN:
        raise UserError(f"seq_len = {seq_len}: must be from 1 to {MAX_SEQ_LEN:,}")
    components = _components(model, seq_len)
    causal = sum(component.forward_flops_causal for component in components)
    full = sum(component.forward_flops_full for component in components)
    total, active = total_parameters(model), active_parameters(model)
    return Description(
        name=model.name,
        source=model.source,
        model=model,
        seq_len=seq_len,
        total_parameters=total,
        active_parameters=active,
        active_parameters_without_embedding=active - embedding_parameters(model),
        expert_parameters=expert_parameters(model),
        components=components,
        layers=_layer_kinds(model, seq_len),
        flops_per_token=FlopsPerToken(
            forward_causal=causal,
            forward_full=full,
            forward_backward_causal=3 * causal,
            forward_backward_full=3 * full,
            six_n=int(six_n_flops_per_token(model, seq_len)),
        ),
        token_bytes=_token_bytes(model),
        multi_token_prediction=_multi_token_prediction(model, seq_len),
    )


def _flops(model: ModelSpec, layer: int, seq_len: int, *, causal: bool) -> LayerFlops:
    return layer_forward_flops(model, layer, tokens=1, seq_len=seq_len, causal=causal)


def _components(model: ModelSpec, seq_len: int) -> tuple[ComponentSize, ...]:
    counts = [layer_parameters(model, layer) for layer in range(model.num_layers)]
    causal = [_flops(model, layer, seq_len, causal=True) for layer in range(model.num_layers)]
    full = [_flops(model, layer, seq_len, causal=False) for layer in range(model.num_layers)]

    def over_layers(component: Component, *flops: str) -> ComponentSize:
        parameters = sum(getattr(count, component) for count in counts)
        idle = (model.moe.num_experts - model.moe.top_k) * expert_parameters(model) * len(model.moe_layers)
        return ComponentSize(
            component=component,
            parameters=parameters,
            active_parameters=parameters - idle * (component == "routed_experts"),
            forward_flops_causal=float(sum(getattr(layer, name) for layer in causal for name in flops)),
            forward_flops_full=int(sum(getattr(layer, name) for layer in full for name in flops)),
        )

    def alone(component: Component, parameters: int, flops: int) -> ComponentSize:
        return ComponentSize(
            component=component,
            parameters=parameters,
            active_parameters=parameters,
            forward_flops_causal=float(flops),
            forward_flops_full=int(flops),
        )

    layer_norms = sum(count.norms for count in counts)
    return (
        alone("embedding", embedding_parameters(model), 0),
        over_layers("attention", "attention_projections", "attention_core"),
        over_layers("router", "router"),
        over_layers("routed_experts", "routed_experts"),
        over_layers("shared_experts", "shared_experts"),
        over_layers("dense_mlp", "dense_mlp"),
        alone("norms", layer_norms + final_norm_parameters(model), 0),
        alone("head", head_parameters(model), head_forward_flops(model, 1)),
    )


def _layer_kinds(model: ModelSpec, seq_len: int) -> tuple[LayerKind, ...]:
    """Layers grouped by what they are made of, in the order of their first layer."""
    alike: dict[tuple[bool, bool], list[int]] = {}
    for layer in range(model.num_layers):
        alike.setdefault((model.is_moe(layer), model.is_local(layer)), []).append(layer)
    return tuple(_layer_kind(model, layers, seq_len) for layers in alike.values())


def _layer_kind(model: ModelSpec, layers: list[int], seq_len: int) -> LayerKind:
    first, local = layers[0], model.local_attention
    parameters = layer_parameters(model, first).total
    idle = (model.moe.num_experts - model.moe.top_k) * expert_parameters(model) * model.is_moe(first)
    return LayerKind(
        layers=tuple(layers),
        feed_forward="experts" if model.is_moe(first) else "dense",
        attention=f"{local.kind} {local.size}" if local and model.is_local(first) else "full",
        parameters=parameters,
        active_parameters=parameters - idle,
        forward_flops_causal=float(_flops(model, first, seq_len, causal=True).total),
        forward_flops_full=int(_flops(model, first, seq_len, causal=False).total),
        saved_bytes_per_token=_saved_bytes(model, first),
    )


def _saved_bytes(model: ModelSpec, layer: int) -> int:
    """What a layer keeps from its forward to its backward, for one token, with fused attention and no recomputation."""
    sizes = Sizes(model, ELEMENT_BYTES, tokens=1)
    block = (moe_layer if model.is_moe(layer) else dense_layer)(sizes, Recompute())
    return int(block.kept.total)


def _token_bytes(model: ModelSpec) -> TokenBytes:
    moe = model.moe
    return TokenBytes(
        hidden_state=ELEMENT_BYTES * model.hidden_size,
        key_value_cache=ELEMENT_BYTES * model.attention.cache_width * model.num_layers,
        dispatched=ELEMENT_BYTES * moe.top_k * model.hidden_size,
        expert_inner=ELEMENT_BYTES * moe.top_k * moe.expert_matrices * moe.expert_width,
        logits=ELEMENT_BYTES * model.vocab_size,
    )


def _multi_token_prediction(model: ModelSpec, seq_len: int) -> MultiTokenPrediction | None:
    if not model.mtp_layers:
        return None
    return MultiTokenPrediction(
        modules=model.mtp_layers,
        parameters=mtp_parameters(model),
        forward_flops_causal=float(mtp_forward_flops(model, tokens=1, seq_len=seq_len, causal=True)),
        forward_flops_full=int(mtp_forward_flops(model, tokens=1, seq_len=seq_len, causal=False)),
    )

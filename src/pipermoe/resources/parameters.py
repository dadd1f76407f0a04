"""How many parameters a model has, per component, per layer, per expert: exact integers.

Every formula is written out in docs/resource-model.md. Symbols: d `hidden_size`, E `num_experts`, d_ffn
`expert_width`, H `num_heads`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import singledispatch

from pipermoe.specs.model import Attention, GroupedQueryAttention, Indexer, LatentAttention, ModelSpec


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Parameters of one transformer layer by component."""

    attention: int
    router: int
    routed_experts: int
    shared_experts: int
    dense_mlp: int
    norms: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def dense(self) -> int:
        """All but the routed experts: what data parallelism replicates or shards over dp."""
        return self.total - self.routed_experts


@singledispatch
def attention_parameters(attention: Attention, hidden_size: int) -> int:
    """Projections, biases and query/key norms of one attention block."""
    raise TypeError(f"no parameter count for {type(attention).__name__}")


@attention_parameters.register
def _(attention: GroupedQueryAttention, hidden_size: int) -> int:
    query = attention.num_heads * attention.head_dim
    key_value = attention.num_kv_heads * attention.head_dim
    weights = hidden_size * (query + 2 * key_value) + query * hidden_size
    biases = attention.qkv_bias * (query + 2 * key_value) + attention.output_bias * hidden_size
    norms = {"none": 0, "l2": 0, "head": 2 * attention.head_dim, "full": query + key_value}[attention.qk_norm]
    return weights + biases + norms + attention.sinks * attention.num_heads


@attention_parameters.register
def _(attention: LatentAttention, hidden_size: int) -> int:
    """Section 2.1 of DeepSeek-V2 (arXiv 2405.04434); a norm follows each down-projection."""
    heads, q_rank, kv_rank = attention.num_heads, attention.q_lora_rank, attention.kv_lora_rank
    query_input = q_rank or hidden_size
    kv_down = kv_rank + attention.qk_rope_head_dim
    weights = (
        hidden_size * q_rank
        + query_input * heads * attention.query_key_dim
        + hidden_size * kv_down
        + kv_rank * heads * (attention.qk_nope_head_dim + attention.v_head_dim)
        + heads * attention.v_head_dim * hidden_size
    )
    biases = attention.bias * (q_rank + kv_down + hidden_size)
    return weights + biases + q_rank + kv_rank + indexer_parameters(attention.indexer, hidden_size, q_rank)


@singledispatch
def replicated_attention_parameters(attention: Attention, hidden_size: int) -> int:
    """The part of `attention_parameters` that every rank of a tensor-parallel group holds."""
    raise TypeError(f"no parameter count for {type(attention).__name__}")


@replicated_attention_parameters.register
def _(attention: GroupedQueryAttention, hidden_size: int) -> int:
    """Norms of one head, and the bias behind the row-parallel product."""
    return 2 * attention.head_dim * (attention.qk_norm == "head") + attention.output_bias * hidden_size


@replicated_attention_parameters.register
def _(attention: LatentAttention, hidden_size: int) -> int:
    """Heads are divided, so all that comes before the heads is not: both down-projections, their norms, the indexer."""
    q_rank, kv_down = attention.q_lora_rank, attention.kv_lora_rank + attention.qk_rope_head_dim
    down = hidden_size * (q_rank + kv_down) + q_rank + attention.kv_lora_rank
    biases = attention.bias * (q_rank + kv_down + hidden_size)
    return down + biases + indexer_parameters(attention.indexer, hidden_size, q_rank)


def indexer_parameters(indexer: Indexer | None, hidden_size: int, q_lora_rank: int) -> int:
    """Query, key and head-weight projections of the sparse-attention indexer and the LayerNorm of its key."""
    if indexer is None:
        return 0
    query = q_lora_rank * indexer.num_heads * indexer.head_dim
    return query + hidden_size * indexer.head_dim + hidden_size * indexer.num_heads + 2 * indexer.head_dim


def mlp_parameters(hidden_size: int, width: int, *, matrices: int, bias: bool) -> int:
    """A feed-forward block: `matrices - 1` projections to `width` and one back, each with a bias if `bias`."""
    return matrices * hidden_size * width + bias * ((matrices - 1) * width + hidden_size) * (width > 0)


def expert_parameters(model: ModelSpec) -> int:
    """Parameters of one routed expert: `expert_matrices` matrices of d x d_ffn, and their biases."""
    moe = model.moe
    return mlp_parameters(model.hidden_size, moe.expert_width, matrices=moe.expert_matrices, bias=moe.expert_bias)


def router_parameters(model: ModelSpec) -> int:
    """The gate: d x E weights, a bias and a counted correction bias per expert."""
    moe = model.moe
    return moe.num_experts * (model.hidden_size + moe.router.bias + (moe.router.correction_bias == "parameter"))


def norm_parameters(model: ModelSpec) -> int:
    """One normalisation over the hidden size: a weight, and a bias for LayerNorm."""
    return model.hidden_size * (2 if model.norm_bias else 1)


def layer_parameters(model: ModelSpec, layer: int) -> LayerParameters:
    """Parameters of `layer` (0-based) by component."""
    return _layer(model, is_moe=model.is_moe(layer))


def _layer(model: ModelSpec, is_moe: bool) -> LayerParameters:
    moe, hidden, bias = model.moe, model.hidden_size, model.mlp_bias
    shared = mlp_parameters(hidden, moe.shared_width, matrices=moe.expert_matrices, bias=bias)
    dense = mlp_parameters(hidden, model.dense_width, matrices=model.dense_matrices, bias=bias)
    return LayerParameters(
        attention=attention_parameters(model.attention, hidden),
        router=router_parameters(model) * is_moe,
        routed_experts=moe.num_experts * expert_parameters(model) * is_moe,
        shared_experts=(shared + hidden * moe.shared_gate) * is_moe,
        dense_mlp=dense * (not is_moe),
        norms=model.norms_per_layer * norm_parameters(model),
    )


@dataclass(frozen=True, slots=True)
class Spread:
    """Trained parameters of one layer by how tensor parallelism spreads them (Shoeybi et al., arXiv 1909.08053).

    `dense` are divided over tp; `dense_replicated` (norms, router, gates, biases of row-parallel products) are on every
    tp rank. `expert` are the routed experts' divided over ep and etp; `expert_replicated` only over ep.
    """

    dense: int
    dense_replicated: int
    expert: int
    expert_replicated: int


def layer_spread(model: ModelSpec, *, is_moe: bool) -> Spread:
    """How the parameters of one layer are spread. A counted correction bias is not trained, so not in it."""
    moe, hidden, parameters = model.moe, model.hidden_size, _layer(model, is_moe)
    replicated = replicated_attention_parameters(model.attention, hidden) + parameters.norms
    if is_moe:
        untrained = moe.num_experts * (moe.router.correction_bias == "parameter")
        shared_replicated = (moe.shared_gate + (model.mlp_bias and moe.shared_width > 0)) * hidden
        replicated += parameters.router - untrained + shared_replicated
        dense = parameters.dense - untrained - replicated
    else:
        replicated += model.mlp_bias * hidden
        dense = parameters.dense - replicated
    expert_replicated = moe.num_experts * moe.expert_bias * hidden * is_moe
    return Spread(dense, replicated, parameters.routed_experts - expert_replicated, expert_replicated)


def embedding_parameters(model: ModelSpec) -> int:
    """The token embedding, V x d."""
    return model.vocab_size * model.hidden_size


def head_parameters(model: ModelSpec) -> int:
    """Output projection; no weights of its own when it is tied to the embedding."""
    weights = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return weights + model.head_bias * model.vocab_size


def final_norm_parameters(model: ModelSpec) -> int:
    return norm_parameters(model)


def mtp_parameters(model: ModelSpec) -> int:
    """All multi-token prediction modules; embedding and head are the model's own.

    Each is an MoE layer behind a 2d -> d projection of the normalised state and next token, and a norm before the
    head. Source: DeepSeek-V3, arXiv 2412.19437, section 2.2, and its published weights.
    """
    return model.mtp_layers * (_layer(model, is_moe=True).total + sum(join_parameters(model)))


def join_parameters(model: ModelSpec) -> tuple[int, int]:
    """What a multi-token prediction module has beside its layer: (divided over tp, on every tp rank)."""
    return 2 * model.hidden_size**2, 3 * norm_parameters(model)


def total_parameters(model: ModelSpec) -> int:
    """All parameters but those of multi-token prediction: what `transformers` counts."""
    layers = sum(layer_parameters(model, layer).total for layer in range(model.num_layers))
    return layers + embedding_parameters(model) + head_parameters(model) + final_norm_parameters(model)


def active_parameters(model: ModelSpec) -> int:
    """Parameters that one token meets: the total without the E - k routed experts that it does not go to."""
    idle = model.moe.num_experts - model.moe.top_k
    return total_parameters(model) - len(model.moe_layers) * idle * expert_parameters(model)

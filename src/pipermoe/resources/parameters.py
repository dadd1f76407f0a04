"""How many parameters a model has, per component, per layer, per expert: exact integers."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pipermoe.specs.model import GroupedQueryAttention, ModelSpec


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


def attention_parameters(attention: GroupedQueryAttention, hidden_size: int) -> int:
    """Projections, biases and query/key norms of one attention block."""
    query = attention.num_heads * attention.head_dim
    key_value = attention.num_kv_heads * attention.head_dim
    weights = hidden_size * (query + 2 * key_value) + query * hidden_size
    biases = attention.qkv_bias * (query + 2 * key_value) + attention.output_bias * hidden_size
    norms = {"none": 0, "head": 2 * attention.head_dim, "full": query + key_value}[attention.qk_norm]
    return weights + biases + norms


def expert_parameters(model: ModelSpec) -> int:
    """Parameters of one routed expert: `expert_matrices` matrices of d x d_ffn."""
    return model.moe.expert_matrices * model.hidden_size * model.moe.expert_width


def layer_parameters(model: ModelSpec, layer: int) -> LayerParameters:
    """Parameters of `layer` (0-based) by component."""
    is_moe, moe, hidden = model.is_moe(layer), model.moe, model.hidden_size
    shared = moe.expert_matrices * hidden * moe.shared_width + hidden * moe.shared_gate
    return LayerParameters(
        attention=attention_parameters(model.attention, hidden),
        router=(hidden * moe.num_experts + moe.num_experts * moe.router.bias) * is_moe,
        routed_experts=moe.num_experts * expert_parameters(model) * is_moe,
        shared_experts=shared * is_moe,
        dense_mlp=3 * hidden * model.dense_width * (not is_moe),
        norms=2 * hidden,
    )


def embedding_parameters(model: ModelSpec) -> int:
    return model.vocab_size * model.hidden_size


def head_parameters(model: ModelSpec) -> int:
    """Output projection; none when it is tied to the embedding."""
    return 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size


def final_norm_parameters(model: ModelSpec) -> int:
    return model.hidden_size

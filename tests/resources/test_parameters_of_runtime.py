"""Any legal model that the runtime can build has the parameters and executes the FLOPs that the closed forms say."""

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from pipermoe.modules.model import MoELayer, StageModel  # noqa: E402
from pipermoe.modules.rotary import rotation_of  # noqa: E402
from pipermoe.modules.router import count_choices  # noqa: E402
from pipermoe.modules.weight_gradients import WeightGradients  # noqa: E402
from pipermoe.resources.flops import head_forward_flops, layer_forward_flops, model_forward_flops  # noqa: E402
from pipermoe.resources.parameters import (  # noqa: E402
    embedding_parameters,
    expert_parameters,
    final_norm_parameters,
    head_parameters,
    layer_parameters,
    total_parameters,
)
from pipermoe.runtime.counters import FlopCounter  # noqa: E402
from pipermoe.specs.model import (  # noqa: E402
    GroupedQueryAttention,
    LatentAttention,
    LocalAttention,
    MixtureOfExperts,
    ModelSpec,
    Router,
)

WIDTHS, FEW = st.integers(1, 48), st.integers(1, 4)


@st.composite
def grouped_query(draw) -> GroupedQueryAttention:
    num_kv_heads = draw(FEW)
    return GroupedQueryAttention(
        num_heads=num_kv_heads * draw(FEW),
        num_kv_heads=num_kv_heads,
        head_dim=2 * draw(FEW),
        qkv_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from(("none", "head", "full", "l2"))),
        sinks=draw(st.booleans()),
    )


@st.composite
def latent(draw) -> LatentAttention:
    return LatentAttention(
        num_heads=draw(FEW),
        q_lora_rank=draw(st.integers(0, 9)),
        kv_lora_rank=draw(FEW),
        qk_nope_head_dim=draw(FEW),
        qk_rope_head_dim=2 * draw(FEW),
        v_head_dim=draw(FEW),
        bias=draw(st.booleans()),
    )


@st.composite
def models(draw) -> ModelSpec:
    """Models within what the runtime builds; every feature that changes a count varies."""
    num_groups, shared_width = draw(FEW), draw(st.integers(0, 24))
    num_experts = num_groups * draw(FEW)
    open_experts = num_experts // num_groups * (num_groups - 1 or 1)
    num_layers = draw(FEW)
    layers = st.sets(st.integers(0, num_layers - 1), max_size=num_layers - 1).map(sorted).map(tuple)
    dense, local = draw(layers), draw(layers)
    kind, size = draw(st.sampled_from(("sliding", "chunked"))), draw(st.integers(1, 10))
    return ModelSpec(
        name="random",
        vocab_size=draw(WIDTHS),
        hidden_size=draw(WIDTHS),
        num_layers=num_layers,
        attention=draw(st.one_of(grouped_query(), latent())),
        local_attention=LocalAttention(kind=kind, size=size, layers=local) if local else None,
        moe=MixtureOfExperts(
            num_experts=num_experts,
            top_k=draw(st.integers(1, open_experts)),
            expert_width=draw(WIDTHS),
            shared_width=shared_width,
            shared_gate=shared_width > 0 and draw(st.booleans()),
            expert_matrices=draw(st.sampled_from((2, 3))),
            expert_bias=draw(st.booleans()),
            swiglu_limit=draw(st.sampled_from((0.0, 7.0))),
            router=Router(
                score=draw(st.sampled_from(("softmax", "sigmoid"))),
                normalize_top_k=draw(st.booleans()),
                bias=draw(st.booleans()),
                correction_bias=draw(st.sampled_from(("none", "buffer", "parameter"))),
                num_groups=num_groups,
                top_k_groups=num_groups - 1 or 1,
            ),
        ),
        mlp_bias=draw(st.booleans()),
        norm_bias=draw(st.booleans()),
        head_bias=draw(st.booleans()),
        dense_matrices=draw(st.sampled_from((2, 3))),
        dense_layers=dense,
        dense_width=draw(WIDTHS) if dense else 0,
        tie_word_embeddings=draw(st.booleans()),
    )


def built(model: ModelSpec, seq_len: int, device: str) -> StageModel:
    """The whole model as one stage of one rank."""
    with torch.device(device):
        layers = range(model.num_layers)
        return StageModel(model, layers, model.moe.num_experts, seq_len, torch.float32, WeightGradients())


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


@settings(deadline=None, max_examples=40)
@given(model=models())
def test_the_runtimes_model_has_the_parameters_of_the_closed_forms(model):
    stage = built(model, 4, "meta")
    assert count(stage) == total_parameters(model)
    assert count(stage.embedding) == embedding_parameters(model)
    assert count(stage.final_norm) == final_norm_parameters(model)
    assert count(stage.head) == head_parameters(model) + embedding_parameters(model) * model.tie_word_embeddings
    for name, layer in stage.layers.items():
        expected = layer_parameters(model, int(name))
        assert count(layer) == expected.total
        assert count(layer.attention) == expected.attention
        assert count(layer.attention_norm) + count(layer.ffn_norm) == expected.norms
        if isinstance(layer, MoELayer):
            assert count(layer.router) == expected.router
            assert count(layer.experts) == expected.routed_experts == model.moe.num_experts * expert_parameters(model)
            assert count(layer.shared) == expected.shared_experts
        else:
            assert count(layer.mlp) == expected.dense_mlp


@settings(deadline=None, max_examples=25)
@given(model=models(), sequences=st.integers(1, 3), seq_len=st.integers(1, 9))
def test_the_runtimes_forward_executes_the_flops_of_the_closed_forms(model, sequences, seq_len):
    stage = built(model, seq_len, "cpu")
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rotation = rotation_of(model.attention, seq_len, torch.float32)
    tokens = sequences * seq_len
    x_TD = torch.randn(tokens, model.hidden_size)
    sizes = {"tokens": tokens, "seq_len": seq_len, "causal": False}
    with torch.no_grad():
        for name, layer in stage.layers.items():
            with FlopCounter() as counter:
                _layer_forward(model, layer, x_TD, rotation)
            assert counter.flops == layer_forward_flops(model, int(name), **sizes).total
        with FlopCounter() as counter:
            stage.loss(x_TD, torch.zeros(tokens, dtype=torch.int64))
        assert counter.flops == head_forward_flops(model, tokens)
    in_layers = sum(layer_forward_flops(model, layer, **sizes).total for layer in range(model.num_layers))
    assert model_forward_flops(model, **sizes) == in_layers + head_forward_flops(model, tokens)


def _layer_forward(model, layer, x_TD, rotation) -> None:
    """One layer on one rank: dispatch is an index, combine its reverse."""
    if not isinstance(layer, MoELayer):
        layer(x_TD, rotation)
        return
    _, normed_TD, weights_TK, *_, experts_TK = layer.attend(x_TD, rotation, None)
    order_A = experts_TK.flatten().argsort(stable=True)
    rows = count_choices(experts_TK, model.moe.num_experts).tolist()
    layer.experts(normed_TD[order_A // weights_TK.shape[1]], rows)
    if layer.shared is not None:
        layer.shared(normed_TD)

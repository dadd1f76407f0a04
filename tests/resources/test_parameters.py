"""Parameters against closed forms and published figures."""

import pytest

from pipermoe.resources.parameters import (
    active_parameters,
    attention_parameters,
    embedding_parameters,
    expert_parameters,
    final_norm_parameters,
    head_parameters,
    layer_parameters,
    mlp_parameters,
    mtp_parameters,
    total_parameters,
)
from pipermoe.specs.catalogue import load_model, model_names
from pipermoe.specs.model import GroupedQueryAttention, ModelSpec


def test_qwen3_30b_a3b_has_30_532_122_624_parameters():  # torchtitan's and transformers' count
    assert total_parameters(load_model("qwen3-30b-a3b")) == 30_532_122_624


def test_grouped_query_attention_is_four_matrices_their_biases_and_norms():
    plain = GroupedQueryAttention(num_heads=8, num_kv_heads=2, head_dim=16)
    matrices = 64 * 128 + 2 * 64 * 32 + 128 * 64
    extras = {
        "qkv_bias": (True, 128 + 2 * 32),
        "output_bias": (True, 64),
        "sinks": (True, 8),
        "qk_norm": ("head", 2 * 16),
    }
    assert attention_parameters(plain, 64) == matrices
    for key, (value, parameters) in extras.items():
        assert attention_parameters(plain.model_copy(update={key: value}), 64) == matrices + parameters
    assert attention_parameters(plain.model_copy(update={"qk_norm": "full"}), 64) == matrices + 128 + 32
    assert attention_parameters(plain.model_copy(update={"qk_norm": "l2"}), 64) == matrices


def test_latent_attention_of_deepseek_v3():  # arXiv 2412.19437: d 7168, 128 heads, ranks 1536 and 512
    query = 7168 * 1536 + 1536 + 1536 * 128 * 192
    key_value = 7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128)
    output = 128 * 128 * 7168
    assert attention_parameters(load_model("deepseek-v3").attention, 7168) == query + key_value + output


def test_the_indexer_of_deepseek_v32_adds_14_million_per_layer():
    v3, v32 = (attention_parameters(load_model(f"deepseek-{name}").attention, 7168) for name in ("v3", "v3.2"))
    assert v32 - v3 == 1536 * 64 * 128 + 7168 * 128 + 7168 * 64 + 2 * 128 == 13_959_424


def test_an_mlp_has_a_bias_after_every_matrix():
    assert mlp_parameters(10, 30, matrices=3, bias=True) == 3 * 10 * 30 + 30 + 30 + 10
    assert mlp_parameters(10, 30, matrices=2, bias=True) == 2 * 10 * 30 + 30 + 10
    assert mlp_parameters(10, 0, matrices=3, bias=True) == 0


def test_an_expert_of_gpt_oss_has_biases():
    assert expert_parameters(load_model("gpt-oss-20b")) == 3 * 2880 * 2880 + 2 * 2880 + 2880


@pytest.mark.parametrize("name", model_names())
def test_the_total_is_the_sum_of_its_parts_and_layers_of_theirs(name):
    model = load_model(name)
    layers = [layer_parameters(model, layer) for layer in range(model.num_layers)]
    ends = embedding_parameters(model) + head_parameters(model) + final_norm_parameters(model)
    assert total_parameters(model) == sum(layer.total for layer in layers) + ends
    assert all(layer.dense + layer.routed_experts == layer.total for layer in layers)
    assert all((layer.routed_experts > 0) == model.is_moe(i) for i, layer in enumerate(layers))
    assert all((layer.dense_mlp > 0) != model.is_moe(i) for i, layer in enumerate(layers))


def test_tied_embeddings_have_no_head_of_their_own():
    untied = load_model("tiny-moe")
    tied = untied.model_copy(update={"tie_word_embeddings": True})
    assert total_parameters(untied) - total_parameters(tied) == untied.vocab_size * untied.hidden_size


def test_layer_norm_has_a_bias_that_rms_norm_has_not():
    rms = load_model("tiny-moe")
    layer = rms.model_copy(update={"norm_bias": True})
    assert total_parameters(layer) - total_parameters(rms) == (2 * rms.num_layers + 1) * rms.hidden_size


@pytest.mark.parametrize(
    ("name", "active"),
    [  # published active parameters per token, in billions
        ("deepseek-v2", 21),
        ("deepseek-v3", 37),
        ("glam-1.2t", 96.6),
        ("kimi-k2", 32),
        ("mixtral-8x7b", 12.9),
        ("mixtral-8x22b", 39),
        ("olmoe-1b-7b", 1.3),
        ("qwen2-57b-a14b", 14),
        ("arctic", 17),
        ("dbrx", 36),
    ],
)
def test_active_parameters_are_the_published_ones_within_their_rounding(name, active):
    assert active_parameters(load_model(name)) / 1e9 == pytest.approx(active, rel=0.03)


def test_active_parameters_leave_out_the_experts_a_token_does_not_visit():
    model = load_model("deepseek-v2-lite")
    assert total_parameters(model) - active_parameters(model) == 26 * (64 - 6) * 3 * 2048 * 1408


def attention_and_experts(model: ModelSpec, experts: int) -> int:
    """Parameters of attention and of `experts` experts in every layer: what these papers count."""
    per_layer = attention_parameters(model.attention, model.hidden_size) + experts * expert_parameters(model)
    return model.num_layers * per_layer


@pytest.mark.parametrize(("size", "total"), [("small", 10.1), ("medium", 55.2), ("large", 201.4), ("super", 545.4)])
def test_x_moe_counts_two_matrix_experts_in_units_of_2_to_the_30(size, total):
    model = load_model(f"xmoe-{size}")  # X-MoE, arXiv 2508.13337, table 3
    assert round(attention_and_experts(model, model.moe.num_experts) / 2**30, 1) == total


@pytest.mark.parametrize(("size", "active"), [("small", 1.3), ("medium", 5.2), ("large", 11.5)])
def test_x_moe_counts_active_parameters_alike(size, active):  # Super is printed as 28.7, which this makes 28.4
    model = load_model(f"xmoe-{size}")
    assert round(attention_and_experts(model, model.moe.top_k) / 2**30, 1) == active


@pytest.mark.parametrize(("name", "experts"), [("110b", 16), ("862b", 128), ("1.7t", 256)])
def test_the_weak_scaling_models_of_piper_have_two_matrices_per_expert(name, experts):
    counted = attention_and_experts(load_model(f"piper-{name}"), experts)
    assert counted == 32 * (4 * 5120**2 + 2 * experts * 5120 * 20480)


def test_multi_token_prediction_of_deepseek_v3_is_a_layer_a_projection_and_three_norms():
    model = load_model("deepseek-v3")
    assert mtp_parameters(model) == layer_parameters(model, 60).total + 2 * 7168**2 + 3 * 7168
    assert mtp_parameters(load_model("kimi-k2")) == 0

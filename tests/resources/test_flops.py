"""FLOPs against closed forms, against another program's figure, and against counting keys one by one."""

from dataclasses import fields

import numpy as np
import pytest

from pipermoe.resources.flops import (
    LayerFlops,
    attention_core_flops,
    attention_projection_flops,
    core_padding_flops,
    head_forward_flops,
    keys_per_query,
    layer_forward_flops,
    model_forward_flops,
    mtp_forward_flops,
    six_n_flops_per_token,
)
from pipermoe.resources.parameters import layer_parameters
from pipermoe.specs.catalogue import load_model, model_names
from pipermoe.specs.model import LocalAttention, ModelSpec


def test_qwen3_30b_a3b_at_8192_tokens_has_the_figure_of_torchtitan():
    assert six_n_flops_per_token(load_model("qwen3-30b-a3b"), 8192) == 37_578_559_488


def test_products_of_matrices_are_6n_without_the_norms():
    model = load_model("qwen3-30b-a3b")
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    executed = 3 * model_forward_flops(model, tokens=1, seq_len=8192, causal=False)
    assert executed == six_n_flops_per_token(model, 8192) - 6 * norms == 37_577_293_824


def test_a_tied_embedding_is_a_product_in_the_head():
    untied = load_model("tiny-moe")
    tied = untied.model_copy(update={"tie_word_embeddings": True})
    assert six_n_flops_per_token(tied, 64) == six_n_flops_per_token(untied, 64)
    assert head_forward_flops(tied, 10) == 2 * 10 * tied.hidden_size * tied.vocab_size > 0


def test_a_grouped_query_moe_layer_in_closed_form():
    model = load_model("qwen3-30b-a3b")
    assert layer_forward_flops(model, 0, tokens=3, seq_len=8192, causal=False) == LayerFlops(
        attention_projections=2 * 3 * 2048 * (2 * 32 * 128 + 2 * 4 * 128),
        attention_core=4 * 3 * 8192 * 32 * 128,
        router=2 * 3 * 2048 * 128,
        routed_experts=2 * 3 * 8 * 3 * 2048 * 768,
        shared_experts=0,
        dense_mlp=0,
    )


def test_a_dense_layer_has_no_router_and_an_moe_layer_no_dense_mlp():
    model = load_model("deepseek-v3")
    dense = layer_forward_flops(model, 0, tokens=1, seq_len=1, causal=False)
    moe = layer_forward_flops(model, 3, tokens=1, seq_len=1, causal=False)
    assert (dense.router, dense.routed_experts, dense.shared_experts) == (0, 0, 0)
    assert (dense.dense_mlp, moe.dense_mlp) == (2 * 3 * 7168 * 18432, 0)


def test_the_gate_of_a_shared_expert_is_one_more_column():
    model = load_model("qwen2-57b-a14b")
    flops = layer_forward_flops(model, 0, tokens=1, seq_len=1, causal=False)
    assert flops.shared_experts == 2 * 3584 * (3 * 20480 + 1)


@pytest.mark.parametrize("name", [name for name in model_names() if not name.startswith("gpt-oss")])
def test_projections_are_two_flops_per_weight_for_every_token(name):
    """In every model without biases in products: attention's weights are its parameters less biases and norms."""
    model = load_model(name)
    flops = layer_forward_flops(model, model.moe_layers[0], tokens=1, seq_len=1, causal=False)
    parameters = layer_parameters(model, model.moe_layers[0])
    router = parameters.router - model.moe.num_experts * (model.moe.router.correction_bias == "parameter")
    assert flops.router == 2 * router
    assert flops.routed_experts * model.moe.num_experts == 2 * parameters.routed_experts * model.moe.top_k
    assert flops.shared_experts == 2 * parameters.shared_experts


def test_latent_attention_has_queries_and_values_of_different_length():
    model = load_model("deepseek-v3")
    assert attention_core_flops(model, 0, tokens=5, seq_len=100, causal=False) == 2 * 5 * 100 * 128 * (192 + 128)
    assert core_padding_flops(model, 0, tokens=5, seq_len=100) == 2 * 5 * 100 * 128 * (192 - 128)
    executed = layer_forward_flops(model, 0, tokens=5, seq_len=100, causal=False).attention_core
    needed = layer_forward_flops(model, 0, tokens=5, seq_len=100, causal=True).attention_core
    assert (executed, needed) == (2 * 5 * 100 * 128 * 2 * 192, 5 * 100 * 128 * (192 + 128))
    weights = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    assert attention_projection_flops(model.attention, 7168, 5) == 2 * 5 * weights


def test_the_indexer_has_three_projections_of_its_own():
    v3, v32 = (attention_projection_flops(load_model(f"deepseek-{name}").attention, 7168, 5) for name in ("v3", "v3.2"))
    assert v32 - v3 == 2 * 5 * (1536 * 64 * 128 + 7168 * 128 + 7168 * 64)


def test_sparse_attention_scores_all_keys_lightly_and_attends_to_2048():
    model = load_model("deepseek-v3.2")
    indexer = 2 * 64 * (128 + 1)
    core = 2 * 128 * (192 + 128)
    assert attention_core_flops(model, 0, tokens=1, seq_len=8192, causal=False) == 8192 * indexer + 2048 * core


def brute_force_keys(seq_len: int, sees, size: int) -> float:
    """Mean keys per query by walking over all pairs, the diagonal counted half as in the closed forms."""
    seen = sum(sees(query, key, size) for query in range(seq_len) for key in range(query + 1))
    return (seen - seq_len / 2) / seq_len


@pytest.mark.parametrize("seq_len", [1, 5, 16, 23, 64])
@pytest.mark.parametrize("size", [1, 4, 16, 100])
@pytest.mark.parametrize(
    ("kind", "sees"),
    [
        ("chunked", lambda query, key, size: query // size == key // size),
        ("sliding", None),
    ],
)
def test_causal_keys_equal_a_count_of_all_visible_pairs(kind, sees, size, seq_len):
    model = load_model("tiny-moe").model_copy(
        update={"local_attention": LocalAttention(kind=kind, size=size, layers=(0,))}
    )
    if kind == "chunked":
        expected = brute_force_keys(seq_len, sees, size)
    else:  # the continuous form: a query at position p sees min(p, size) keys
        expected = sum(min(p, size) + min(p + 1, size) for p in range(seq_len)) / 2 / seq_len
    assert keys_per_query(model, 0, seq_len, causal=True) == pytest.approx(expected, rel=1e-12)
    assert keys_per_query(model, 1, seq_len, causal=True) == seq_len / 2
    # Executed: each block of queries over its own keys and, sliding, over those of the block before.
    starts = range(0, seq_len, size)
    blocks = [(min(size, seq_len - start), size * (kind == "sliding" and start > 0)) for start in starts]
    executed = sum(queries * (before + queries) for queries, before in blocks)
    assert keys_per_query(model, 0, seq_len, causal=False) == executed / seq_len


def test_a_window_beyond_the_sequence_changes_nothing():
    model = load_model("gpt-oss-20b")
    for causal in (True, False):
        windowed, whole = (attention_core_flops(model, layer, tokens=1, seq_len=128, causal=causal) for layer in (0, 1))
        assert windowed == whole


@pytest.mark.parametrize("name", ["tiny-moe", "deepseek-v3.2", "gpt-oss-20b", "llama-4-scout"])
def test_arrays_give_what_their_elements_give(name):
    model: ModelSpec = load_model(name)
    tokens, seq_len = np.array([1, 7, 4096]), np.array([64, 1024, 16384])
    for causal in (True, False):
        together = layer_forward_flops(model, 0, tokens=tokens, seq_len=seq_len, causal=causal)
        for i in range(3):
            alone = layer_forward_flops(model, 0, tokens=int(tokens[i]), seq_len=int(seq_len[i]), causal=causal)
            for field in fields(LayerFlops):
                assert np.broadcast_to(getattr(together, field.name), 3)[i] == getattr(alone, field.name)


def test_routed_rows_stand_for_a_ranks_own_share():
    model = load_model("tiny-moe")
    full = layer_forward_flops(model, 0, tokens=10, seq_len=8, causal=False)
    share = layer_forward_flops(model, 0, tokens=10, seq_len=8, causal=False, routed_rows=5)
    assert share.routed_experts * 4 == full.routed_experts
    assert share.router == full.router


def test_backward_splits_into_input_and_weight_gradients_and_takes_twice_the_forward():
    flops = layer_forward_flops(load_model("deepseek-v3"), 3, tokens=2, seq_len=16, causal=False)
    assert flops.input_gradient + flops.weight_gradient == 2 * flops.total
    assert flops.weight_gradient == flops.total - flops.attention_core  # the core has no weights


def test_multi_token_prediction_is_a_layer_a_projection_and_a_head():
    model = load_model("deepseek-v3")
    layer = layer_forward_flops(model, 60, tokens=3, seq_len=64, causal=True).total
    expected = layer + 2 * 3 * 2 * 7168**2 + head_forward_flops(model, 3)
    assert mtp_forward_flops(model, tokens=3, seq_len=64, causal=True) == expected

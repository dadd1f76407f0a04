"""What the importer understands beyond the count: attention, layer patterns, routing, families by assumption."""

import json
from pathlib import Path

import pytest

from pipermoe.resources.parameters import total_parameters
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.errors import UserError
from pipermoe.specs.hf import read_config
from pipermoe.specs.model import Indexer, LatentAttention, LocalAttention, ModelSpec

CONFIGS = Path(__file__).parent / "data" / "configs"


def config(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def imported(name: str) -> ModelSpec:
    return read_config(CONFIGS / f"{name}.json")


def written(tmp_path: Path, data: dict) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    return path


# Families that transformers does not have: their public configs, against the catalogue's entries from the papers.
GROK_1 = {
    "model_type": "grok-1",
    "vocab_size": 131072,
    "hidden_size": 6144,
    "intermediate_size": 32768,
    "num_hidden_layers": 64,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
}
ARCTIC = {
    "model_type": "arctic",
    "vocab_size": 32000,
    "hidden_size": 7168,
    "intermediate_size": 4864,
    "num_hidden_layers": 35,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "num_experts_per_tok": 2,
    "moe_layer_frequency": 1,
    "parallel_attn_mlp_res": True,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize("data", [GROK_1, ARCTIC], ids=["grok-1", "arctic"])
def test_families_outside_of_transformers_are_read_as_the_catalogue_has_them(tmp_path, data):
    expected = load_model(data["model_type"])
    model = read_config(written(tmp_path, data))
    assert model.model_copy(update={"name": expected.name, "source": expected.source}) == expected


def test_arctic_without_its_dense_half_may_alternate(tmp_path):
    data = ARCTIC | {"parallel_attn_mlp_res": False, "moe_layer_frequency": 2}
    model = read_config(written(tmp_path, data))
    assert (model.moe.shared_width, model.norms_per_layer, model.moe_layers) == (0, 2, tuple(range(1, 35, 2)))
    with pytest.raises(UserError, match="moe_layer_frequency"):
        read_config(written(tmp_path, ARCTIC | {"moe_layer_frequency": 2}))


def test_deepseek_v2_lite_projects_its_queries_directly():
    attention = imported("deepseek-v2-lite").attention
    assert isinstance(attention, LatentAttention)
    assert (attention.q_lora_rank, attention.query_key_dim, attention.value_dim) == (0, 192, 128)


def test_deepseek_v2_routes_within_three_of_eight_groups():
    router = imported("deepseek-v2").moe.router
    assert (router.score, router.num_groups, router.top_k_groups, router.scaling_factor) == ("softmax", 8, 3, 16.0)


def test_deepseek_v3_has_three_leading_dense_layers_and_one_mtp_module():
    model = imported("deepseek-v3")
    assert (model.dense_layers, model.dense_width, model.mtp_layers) == ((0, 1, 2), 18432, 1)
    assert model.moe.router.correction_bias == "buffer"


def test_deepseek_v32_has_an_indexer():
    attention = imported("deepseek-v3.2").attention
    assert isinstance(attention, LatentAttention)
    assert attention.indexer == Indexer(num_heads=64, head_dim=128, top_k=2048)


def test_llama_4_maverick_interleaves_and_attends_in_chunks_on_rotary_layers():
    model = imported("llama-4-maverick")
    assert model.moe_layers == tuple(range(1, 48, 2))
    assert model.moe.shared_width == model.moe.expert_width == 8192
    rotary = tuple(layer for layer in range(48) if (layer + 1) % 4)
    assert model.local_attention == LocalAttention(kind="chunked", size=8192, layers=rotary)


def test_gpt_oss_slides_on_every_other_layer():
    assert imported("gpt-oss-20b").local_attention == LocalAttention(
        kind="sliding", size=128, layers=tuple(range(0, 24, 2))
    )


def test_a_window_without_a_list_of_layers_is_on_all_of_them():
    for name, size in (("phi-3.5-moe", 131072), ("qwen3-moe-mixed", 128)):
        model = imported(name)
        assert model.local_attention == LocalAttention(kind="sliding", size=size, layers=tuple(range(model.num_layers)))


def test_windows_of_qwen2_moe_are_on_even_layers_below_a_limit():
    assert imported("qwen2-moe-windows").local_attention == LocalAttention(kind="sliding", size=128, layers=(0, 2))


def test_a_window_that_is_switched_off_is_none():
    assert imported("qwen2-57b-a14b").local_attention is None
    assert imported("mixtral-8x7b").local_attention is None


@pytest.mark.parametrize(
    ("name", "flag", "default"),
    [
        ("olmoe-1b-7b", "norm_topk_prob", False),
        ("qwen2-57b-a14b", "norm_topk_prob", False),
        ("qwen3-30b-a3b", "norm_topk_prob", False),
        ("deepseek-v2", "norm_topk_prob", False),
        ("deepseek-v3", "norm_topk_prob", True),
        ("glm-4.5", "norm_topk_prob", True),
    ],
)
def test_a_missing_flag_has_the_default_of_its_class_in_transformers(tmp_path, name, flag, default):
    data = config(name)
    del data[flag]
    assert read_config(written(tmp_path, data)).moe.router.normalize_top_k is default


@pytest.mark.parametrize(
    ("name", "key", "field"),
    [
        ("ernie-4.5-21b-a3b", "tie_word_embeddings", True),
        ("mixtral-8x7b", "tie_word_embeddings", False),
        ("granite-3.1-3b-a800m", "tie_word_embeddings", False),
    ],
)
def test_missing_tying_has_the_default_of_its_class_in_transformers(tmp_path, name, key, field):
    data = config(name)
    del data[key]
    assert read_config(written(tmp_path, data)).tie_word_embeddings is field


def test_qwen2_moe_gates_its_shared_expert_and_qwen3_moe_has_none():
    assert imported("qwen2-57b-a14b").moe.shared_gate
    assert imported("qwen3-30b-a3b").moe.shared_width == 0


def test_qwen_layer_patterns_combine_the_step_with_the_dense_list():
    assert imported("qwen3-moe-mixed").moe_layers == (1, 5, 7)  # odd layers by the step, without layer 3 by the list


def test_ernie_experts_lie_in_an_interval_of_layers():
    assert imported("ernie-biases").moe_layers == (3, 5, 7)


@pytest.mark.parametrize("key", ["rope_theta", "rope_parameters"])
def test_the_rotary_base_is_read_in_the_spelling_of_transformers_4_and_5(tmp_path, key):
    data = config("mixtral-8x7b")
    del data["rope_theta"]
    data |= {"rope_theta": 5e5} if key == "rope_theta" else {"rope_parameters": {"rope_theta": 5e5}}
    assert read_config(written(tmp_path, data)).attention.rope_theta == 5e5


def test_mlp_layer_types_of_transformers_5_win_over_the_leading_dense_layers(tmp_path):
    data = config("deepseek-v3-listed") | {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}
    assert read_config(written(tmp_path, data)).dense_layers == (0, 2)


def test_a_folder_is_read_by_its_config_and_named_after_itself(tmp_path):
    folder = tmp_path / "My-Mixtral"
    folder.mkdir()
    written(folder, config("mixtral-8x7b"))
    model = ModelSpec.from_hf_config(folder)
    assert (model.name, model.source) == ("My-Mixtral", "config.json, model_type mixtral")


def test_remote_code_of_a_known_family_is_ignored(tmp_path):
    data = config("mixtral-8x7b") | {"auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    assert total_parameters(read_config(written(tmp_path, data))) == 46_702_792_704


def test_an_unknown_type_is_read_as_the_family_that_is_assumed(tmp_path):
    path = written(tmp_path, config("qwen3-30b-a3b") | {"model_type": "qwen3_vl_moe_text"})
    model = read_config(path, assume="qwen3_moe")
    assert total_parameters(model) == 30_532_122_624
    assert model.source == "config.json, model_type qwen3_vl_moe_text, read as qwen3_moe"


def test_layers_of_glm_5_that_share_an_indexer_are_refused(tmp_path):
    data = config("glm-5")
    data["indexer_types"] = ["full", "shared"] * (data["num_hidden_layers"] // 2)
    with pytest.raises(UserError, match="indexer_types"):
        read_config(written(tmp_path, data))


def test_an_assumed_family_must_know_every_key_that_changes_the_model(tmp_path):
    data = config("mixtral-8x7b") | {"model_type": "mixtral_plus", "n_shared_experts": 2}
    with pytest.raises(UserError, match=r"config\.json: n_shared_experts = 2: changes the model, but family mixtral"):
        read_config(written(tmp_path, data), assume="mixtral")


def test_the_experts_of_qwen3_may_have_the_name_that_transformers_5_writes(tmp_path: Path):
    data = config("qwen3-30b-a3b")
    renamed = data | {"num_local_experts": data["num_experts"]}
    del renamed["num_experts"]
    assert read_config(written(tmp_path, renamed)).moe == read_config(written(tmp_path, data)).moe

"""Every wrong config is one line that names the file and the key; nothing is executed, nothing guessed."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipermoe.specs.errors import UserError
from pipermoe.specs.hf import read_config
from pipermoe.specs.hf.importer import MAX_CONFIG_BYTES
from pipermoe.specs.hf.refusals import REFUSED_KEYS, REFUSED_TYPES

CONFIGS = Path(__file__).parent / "data" / "configs"


def message(tmp_path: Path, base: str = "mixtral-8x7b", *, drop: str = "", assume: str | None = None, **changes) -> str:
    """The error for a config with `changes`, without the folder in front."""
    data = json.loads((CONFIGS / f"{base}.json").read_text()) | changes
    data.pop(drop, None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError) as error:
        read_config(path, assume=assume)
    text = str(error.value)
    assert "\n" not in text
    return text.removeprefix(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": "4096"}, "config.json: hidden_size = '4096': must be a whole number of at least 1"),
        ({"hidden_size": 4096.0}, "config.json: hidden_size = 4096.0: must be a whole number of at least 1"),
        ({"hidden_size": True}, "config.json: hidden_size = True: must be a whole number of at least 1"),
        ({"hidden_size": -4096}, "config.json: hidden_size = -4096: must be a whole number of at least 1"),
        ({"vocab_size": 0}, "config.json: vocab_size = 0: must be a whole number of at least 1"),
        ({"vocab_size": None}, "config.json: vocab_size = None: must be given"),
        ({"hidden_size": 10**30}, f"config.json: hidden_size = {10**30}: must be at most 16,777,216"),
        ({"num_local_experts": 10**6}, "config.json: num_local_experts = 1000000: must be at most 65,536"),
        ({"num_experts_per_tok": 9}, "config.json: num_experts_per_tok = 9: must be at most num_local_experts = 8"),
        (
            {"num_key_value_heads": 7},
            "config.json: num_attention_heads = 32: must be a multiple of num_key_value_heads = 7",
        ),
        (
            {"num_attention_heads": 24},
            "config.json: num_attention_heads = 24: must divide hidden_size = 4096, or give head_dim",
        ),
        ({"rms_norm_eps": float("nan")}, "config.json: rms_norm_eps = nan: must be a number above zero"),
        ({"tie_word_embeddings": "no"}, "config.json: tie_word_embeddings = 'no': must be true or false"),
        ({"model_type": 3}, "config.json: model_type = 3: must be a text"),
        ({"text_config": [1]}, "config.json: text_config = [1]: must be a table of keys and values"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(tmp_path, changes, expected):
    assert message(tmp_path, **changes) == expected


def test_a_missing_size_is_named(tmp_path):
    assert message(tmp_path, drop="intermediate_size") == "config.json: intermediate_size: required key is missing"


def test_a_wrong_value_inside_a_section_is_named_with_the_section(tmp_path):
    assert message(tmp_path, "dbrx", ffn_config={"moe_num_experts": 16, "moe_top_k": 4}) == (
        "config.json: ffn_config.ffn_hidden_size: required key is missing"
    )


def test_a_wrong_value_of_a_multimodal_config_is_named_in_its_text_part(tmp_path):
    text = json.loads((CONFIGS / "llama-4-scout.json").read_text())["text_config"] | {"num_local_experts": -1}
    assert message(tmp_path, "llama-4-scout", text_config=text) == (
        "config.json: text_config.num_local_experts = -1: must be a whole number of at least 1"
    )


def test_more_layers_than_any_model_has_are_an_error_and_not_an_endless_count(tmp_path):
    assert message(tmp_path, num_hidden_layers=10**7) == (
        "config.json: num_hidden_layers = 10000000: must be at most 4,096"
    )


def test_layers_that_do_not_agree_are_refused(tmp_path):
    expected = "differs from layer to layer, which is not priced yet; one size for all is accepted"
    assert message(tmp_path, "hunyuan-a13b", moe_topk=[8, 4]).endswith(expected)


def test_dense_layers_beyond_the_last_are_named(tmp_path):
    assert message(tmp_path, "qwen3-30b-a3b", mlp_only_layers=[48]) == (
        "config.json: mlp_only_layers = [48]: must name layers from 0 to 47"
    )


def test_a_model_without_any_expert_layer_is_refused(tmp_path):
    assert "dense_layers names every layer" in message(tmp_path, "deepseek-v3", first_k_dense_replace=61)


@pytest.mark.parametrize("model_type", sorted(REFUSED_TYPES))
def test_what_cannot_be_priced_is_refused_by_name_with_the_reason(tmp_path, model_type):
    expected = f"config.json: model_type = {model_type!r}: {REFUSED_TYPES[model_type]}"
    assert message(tmp_path, model_type=model_type) == expected
    assert message(tmp_path, model_type=model_type, assume="mixtral") == expected


@pytest.mark.parametrize("key", sorted(REFUSED_KEYS))
def test_a_key_that_cannot_be_priced_is_refused_in_any_family(tmp_path, key):
    changes: dict[str, Any] = {key: 4}
    assert message(tmp_path, **changes) == f"config.json: {key} = 4: {REFUSED_KEYS[key]}"


def test_linear_attention_layers_are_refused(tmp_path):
    assert "layer_types = 'linear_attention': is not priced yet" in message(
        tmp_path, layer_types=["full_attention", "linear_attention"]
    )
    assert "linear-attention layers" in message(tmp_path, "minimax-m2.5", attn_type_list=[1, 0])


def test_an_unknown_type_names_the_known_ones_and_the_way_out(tmp_path):
    text = message(tmp_path, model_type="llama")
    assert text.startswith("config.json: model_type = 'llama': is not a known MoE family; known: arctic, dbrx,")
    assert text.endswith("--assume FAMILY")


def test_a_config_without_a_type_is_not_guessed(tmp_path):
    assert message(tmp_path, drop="model_type").startswith("config.json: model_type: required key is missing")


def test_remote_code_is_refused_by_its_key_and_never_run(tmp_path):
    (tmp_path / "configuration_new.py").write_text("raise SystemExit('executed')")
    text = message(tmp_path, model_type="brand_new", auto_map={"AutoConfig": "configuration_new.NewConfig"})
    assert text.startswith("config.json: auto_map: asks for remote code, which is never run")


def test_a_misspelt_family_is_answered_with_the_nearest(tmp_path):
    assert "--assume mixtrel: unknown family; did you mean mixtral?" in message(
        tmp_path, model_type="brand_new", assume="mixtrel"
    )


def test_assuming_another_family_for_a_known_type_is_an_error(tmp_path):
    assert message(tmp_path, assume="olmoe") == (
        "config.json: model_type = 'mixtral': is known; leave out --assume olmoe"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"hidden_size": 40', "is not valid JSON"),
        (b"[1, 2]", "must hold one table of keys and values"),
        (b"\xff\xfe{}", "is not UTF-8 text"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b" " * (MAX_CONFIG_BYTES + 1), "bytes is expected"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, content, expected):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_50_megabytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(50 * 10**6)  # sparse: if it were read, the zero bytes would be reported instead
    with pytest.raises(UserError, match="is 50,000,000 bytes; a document of at most 2,097,152 bytes is expected"):
        read_config(path)


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        read_config(tmp_path)

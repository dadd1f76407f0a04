"""The rules that a ModelSpec keeps, and the names that lead to one."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipermoe.resources.parameters import active_parameters, total_parameters
from pipermoe.specs.catalogue import load_model, model_names
from pipermoe.specs.documents import load, save
from pipermoe.specs.errors import UserError
from pipermoe.specs.model import (
    GroupedQueryAttention,
    LatentAttention,
    LocalAttention,
    MixtureOfExperts,
    ModelSpec,
    Router,
)

GQA = GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8)
MOE = MixtureOfExperts(num_experts=4, top_k=2, expert_width=16)


def small(**changes) -> ModelSpec:
    sizes = {"name": "small", "vocab_size": 32, "hidden_size": 32, "num_layers": 4, "attention": GQA, "moe": MOE}
    return ModelSpec(**sizes | changes)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"dense_layers": (4,), "dense_width": 8}, r"dense_layers = \[4\] must be below num_layers = 4"),
        ({"dense_layers": (1, 1), "dense_width": 8}, "names a layer twice"),
        ({"dense_layers": (1,)}, "dense_width must be given"),
        ({"dense_layers": (0, 1, 2, 3), "dense_width": 8}, "names every layer"),
        (
            {"local_attention": LocalAttention(kind="sliding", size=8, layers=(9,))},
            r"local_attention.layers = \[9\] must be below",
        ),
        ({"vocab_size": 0}, "greater than 0"),
        ({"hidden_size": True}, "valid integer"),
        ({"hidden_size": "32"}, "valid integer"),
        ({"num_layers": 5000}, "less than or equal to 4096"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon"),
    ],
)
def test_a_model_that_cannot_be_is_refused(changes, rule):
    with pytest.raises(ValidationError, match=rule):
        small(**changes)


@pytest.mark.parametrize(
    ("build", "rule"),
    [
        (lambda: GroupedQueryAttention(num_heads=4, num_kv_heads=3, head_dim=8), "must be a multiple of num_kv_heads"),
        (lambda: MixtureOfExperts(num_experts=4, top_k=5, expert_width=8), "top_k = 5 must be at most num_experts = 4"),
        (lambda: MixtureOfExperts(num_experts=4, top_k=1, expert_width=8, shared_gate=True), "no shared expert"),
        (
            lambda: MixtureOfExperts(num_experts=4, top_k=1, expert_width=8, router=Router(num_groups=3)),
            "must divide num_experts",
        ),
        (lambda: Router(num_groups=2, top_k_groups=3), "must be at most num_groups"),
    ],
)
def test_a_block_that_cannot_be_is_refused(build, rule):
    with pytest.raises(ValidationError, match=rule):
        build()


def test_latent_attention_caches_one_vector_and_the_shared_rotary_key():
    latent = LatentAttention(num_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
    assert (latent.query_key_dim, latent.value_dim, latent.cache_width) == (12, 6, 20)


def test_the_catalogue_has_every_model_under_its_own_name_with_its_source():
    models = [load_model(name) for name in model_names()]
    assert [model.name for model in models] == model_names()
    assert all(model.source for model in models)
    assert len(models) >= 20


def test_a_model_survives_being_written_and_read(tmp_path):
    for name in ("deepseek-v3.2", "llama-4-maverick", "gpt-oss-20b"):
        for suffix in (".toml", ".json"):
            model = load_model(name)
            assert load(save(tmp_path / f"model{suffix}", model), ModelSpec) == model


def test_a_model_is_found_by_catalogue_name_in_any_case_and_by_file(tmp_path):
    mixtral = load_model("Mixtral-8x7B")
    assert mixtral.name == "mixtral-8x7b"
    assert load_model(str(save(tmp_path / "mine.toml", mixtral))) == mixtral


def test_a_folder_does_not_shadow_a_catalogue_entry(tmp_path, monkeypatch):
    (tmp_path / "tiny-moe").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_model("tiny-moe").name == "tiny-moe"


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("mixtral-8x8b", "model 'mixtral-8x8b': not in the catalogue; did you mean mixtral-8x7b or mixtral-8x22b?"),
        ("zzz", "model 'zzz': not in the catalogue; the catalogue has arctic, dbrx,"),
        ("nowhere/zzz.toml", "nowhere/zzz.toml: no such file"),
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B: no such file; did you mean the catalogue's qwen3-30b-a3b"),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_what_was_perhaps_meant(reference, expected):
    with pytest.raises(UserError) as error:
        load_model(reference)
    assert str(error.value).startswith(expected)


def test_a_wrong_key_in_a_model_file_names_file_and_key(tmp_path):
    path = tmp_path / "mine.toml"
    text = 'name = "m"\nvocab_size = 8\nhidden_size = 8\nnum_layers = 2\n'
    path.write_text(text + '[attention]\nkind = "gqa"\nnum_heads = 2\nnum_kv_heads = 2\nhead_dims = 4\n')
    with pytest.raises(UserError) as error:
        load_model(str(path))
    assert "mine.toml: attention" in str(error.value)
    assert "head_dim" in str(error.value)


def test_an_assumed_family_is_only_for_a_config_json(tmp_path):
    path = save(tmp_path / "mine.toml", load_model("tiny-moe"))
    for reference in ("tiny-moe", str(path)):
        with pytest.raises(UserError, match="--assume mixtral"):
            load_model(reference, assume="mixtral")


@pytest.mark.parametrize(
    ("name", "published"),
    [  # billions of parameters, as the publishers round them
        ("arctic", 480),
        ("dbrx", 132),
        ("deepseek-v2", 236),
        ("glam-1.2t", 1200),
        ("grok-1", 314),
        ("hunyuan-a13b", 80),
        ("mixtral-8x22b", 141),
        ("olmoe-1b-7b", 6.9),
        ("piper-110b", 110),
        ("piper-862b", 862),
        ("piper-1.7t", 1700),
        ("switch-base-128", 7.4),
    ],
)
def test_totals_are_the_published_ones_within_their_rounding(name, published):
    assert total_parameters(load_model(name)) / 1e9 == pytest.approx(published, rel=0.035)


def test_the_table_in_the_documentation_is_the_catalogue():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| `(\S+)` \| ([\d.,]+) \| ([\d.,]+) \| (\d+), (\d+) \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == [name for name in model_names() if name != "tiny-moe"]
    for name, total, active, num_experts, top_k in rows:
        model = load_model(name)
        assert float(total.replace(",", "")) == pytest.approx(total_parameters(model) / 1e9, abs=0.0501)
        assert float(active.replace(",", "")) == pytest.approx(active_parameters(model) / 1e9, abs=0.0501)
        assert (int(num_experts), int(top_k)) == (model.moe.num_experts, model.moe.top_k)

"""Recount with transformers on the meta device: the frozen configs, and the published ones of aiconfigurator-core.

Both packages are large and pin much, so they live in an environment of their own: `make test-counts`.
"""

import importlib
import importlib.util
import json
import random
import re
from pathlib import Path

import pytest

from pipermoe.resources.parameters import layer_parameters, total_parameters
from pipermoe.specs.errors import UserError
from pipermoe.specs.hf import FAMILIES, read_config

PACKAGES = ("torch", "transformers", "aiconfigurator_core")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in PACKAGES),
        reason="needs transformers==5.23.0 and aiconfigurator-core==0.12.0: make test-counts",
    ),
]

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "expected_counts.json").read_text())["models"]
SHARED_INDEXERS = ("zai-org--GLM-5.2", "zai-org--GLM-5.3")  # refused, though their family is known
NOT_STRUCTURE = ("quantization_config", "compression_config", "auto_map", "model_type")


def published_configs() -> list[Path]:
    """The config.json files of released models in the wheel aiconfigurator-core, without quantised repetitions."""
    package = importlib.util.find_spec(PACKAGES[-1])
    if package is None or not package.submodule_search_locations:
        return []
    folder = Path(package.submodule_search_locations[0]) / "model_configs"
    return sorted(path for path in folder.glob("*_config.json") if not re.search("quant|FP8|NVFP4", path.name))


def transformers_count(path: Path) -> dict[str, int]:
    """Parameters of the model that transformers builds, and those of its routed experts."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")

    config = json.loads(path.read_text())
    if config["model_type"] not in transformers.CONFIG_MAPPING:
        config = config.get("text_config", config)
    model_type = {"kimi_k2": "deepseek_v3"}.get(config["model_type"], config["model_type"])
    structure = {key: value for key, value in config.items() if key not in NOT_STRUCTURE}
    built = transformers.CONFIG_MAPPING[model_type].from_dict(structure)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(built.get_text_config())
    routed = [p for name, p in model.named_parameters() if ".experts." in name]
    return {"total": sum(p.numel() for p in model.parameters()), "routed_experts": sum(p.numel() for p in routed)}


def own_count(path: Path) -> dict[str, int]:
    model = read_config(path)
    routed = sum(layer_parameters(model, layer).routed_experts for layer in range(model.num_layers))
    return {"total": total_parameters(model), "routed_experts": routed}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_frozen_counts_are_those_of_transformers(name):
    assert transformers_count(DATA / "configs" / f"{name}.json") == EXPECTED[name]


@pytest.mark.parametrize("path", published_configs(), ids=lambda path: path.stem)
def test_published_configs_are_counted_alike_or_refused(path):
    config = json.loads(path.read_text())
    model_type = config.get("text_config", config).get("model_type")
    if model_type not in FAMILIES or path.name.startswith(SHARED_INDEXERS):
        with pytest.raises(UserError, match=r"not priced yet|not a known"):
            read_config(path)
    else:
        assert own_count(path) == transformers_count(path)


SMALL = {  # one config of every dialect whose sizes and flags may be redrawn
    "mixtral-8x7b": (),
    "qwen2-57b-a14b": ("qkv_bias",),
    "qwen3-30b-a3b": ("attention_bias",),
    "olmoe-1b-7b": ("attention_bias",),
    "deepseek-v2": ("attention_bias", "mlp_bias"),
    "deepseek-v2-lite": ("attention_bias",),
    "deepseek-v3": ("attention_bias",),
    "deepseek-v3.2": ("attention_bias",),
    "gpt-oss-20b": ("attention_bias",),
    "glm-4.5": ("attention_bias", "use_qk_norm"),
    "minimax-m2.5": (),
    "granite-3.1-3b-a800m": ("attention_bias",),
    "phi-3.5-moe": ("attention_bias", "lm_head_bias"),
    "ernie-4.5-21b-a3b": ("use_bias",),
    "hunyuan-a13b": ("attention_bias",),
}


EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk")


def redrawn(base: dict, flags: tuple[str, ...], draw: random.Random) -> dict:
    """`base` with every size and flag drawn anew, small enough to build in milliseconds."""
    key_value_heads = draw.randint(1, 3)
    heads = key_value_heads * draw.randint(1, 3)
    sizes = {
        "vocab_size": draw.randint(10, 99),
        "hidden_size": heads * 2 * draw.randint(1, 9),
        "num_hidden_layers": draw.randint(4, 7),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": 2 * draw.randint(1, 9),
        "intermediate_size": draw.randint(1, 50),
        "moe_intermediate_size": draw.randint(1, 50),
        "shared_expert_intermediate_size": draw.randint(1, 50),
        "decoder_sparse_step": draw.randint(1, 3),
        "first_k_dense_replace": draw.randint(0, 3),
        "n_shared_experts": draw.randint(1, 3),
        "moe_num_shared_experts": draw.randint(0, 3),
        "moe_layer_start_index": draw.randint(0, 2),
        "moe_layer_interval": draw.randint(1, 3),
        "q_lora_rank": draw.randint(1, 20),
        "kv_lora_rank": draw.randint(1, 20),
        "qk_nope_head_dim": draw.randint(1, 20),
        "qk_rope_head_dim": 2 * draw.randint(1, 9),
        "v_head_dim": draw.randint(1, 20),
        "index_n_heads": draw.randint(1, 5),
        "index_head_dim": draw.randint(2, 20),
        "n_group": 1,
        "topk_group": 1,
    }
    sizes |= dict.fromkeys(EXPERTS, draw.randint(1, 6)) | dict.fromkeys(CHOSEN, 1)
    config = {key: value for key, value in base.items() if key in CHOSEN or not isinstance(value, list)}
    config |= {key: size for key, size in sizes.items() if config.get(key) is not None}
    return config | {key: draw.random() < 0.5 for key in (*flags, "tie_word_embeddings")}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_random_sizes_and_flags_are_counted_alike(tmp_path, name):
    draw = random.Random(name)
    path = tmp_path / "config.json"
    base = json.loads((DATA / "configs" / f"{name}.json").read_text())
    for _ in range(12):
        config = redrawn(base, SMALL[name], draw)
        path.write_text(json.dumps(config))
        assert own_count(path) == transformers_count(path), config

"""Recount with transformers on the meta device: the frozen configs, and the published ones of aiconfigurator-core.

Both packages are large and pin much, so they live in an environment of their own: `make test-counts`.
"""

import importlib
import importlib.util
import json
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

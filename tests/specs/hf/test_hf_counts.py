"""Totals of imported configs equal, to the unit, what transformers 5.23.0 counts on the meta device (frozen)."""

import json
from pathlib import Path

import pytest

from pipermoe.resources.parameters import layer_parameters, total_parameters
from pipermoe.specs.hf import FAMILIES, read_config

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "expected_counts.json").read_text())["models"]
NOT_IN_TRANSFORMERS = {"arctic", "grok-1"}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_the_count_equals_that_of_transformers(name):
    model = read_config(DATA / "configs" / f"{name}.json")
    routed = sum(layer_parameters(model, layer).routed_experts for layer in range(model.num_layers))
    assert {"total": total_parameters(model), "routed_experts": routed} == EXPECTED[name]


def test_every_config_has_a_count_and_every_family_a_config():
    configs = {path.stem: json.loads(path.read_text()) for path in (DATA / "configs").glob("*.json")}
    assert set(configs) == set(EXPECTED)
    types = {config.get("text_config", config)["model_type"] for config in configs.values()}
    assert types == set(FAMILIES) - NOT_IN_TRANSFORMERS

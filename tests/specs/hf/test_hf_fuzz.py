"""Whatever a config.json holds, the answer is a model that can be described or one UserError: nothing else escapes."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipermoe.resources.describe import describe_model
from pipermoe.specs.errors import UserError
from pipermoe.specs.hf import read_config
from pipermoe.specs.model import ModelSpec

DATA = Path(__file__).parent / "data" / "configs"
CONFIGS = {path.stem: json.loads(path.read_text()) for path in sorted(DATA.glob("*.json"))}
ONE_OF_EACH_FAMILY = {config.get("text_config", config)["model_type"]: name for name, config in CONFIGS.items()}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from((2**24, 2**31, 10**30, -(10**30))),
    st.floats(allow_nan=True),
    st.text(max_size=4),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner))


@st.composite
def mutated_configs(draw) -> dict:
    """A real config in which a few keys are dropped, replaced, or taken over from another family."""
    config = json.loads(json.dumps(CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))]))
    part = config.get("text_config", config)
    for key in draw(st.lists(st.sampled_from(sorted(part)), min_size=1, max_size=3)):
        action = draw(st.sampled_from(("drop", "replace", "replace", "replace")))
        if action == "drop":
            part.pop(key, None)
        else:
            part[key] = draw(VALUES)
    return config


def outcome(path: Path, config: dict, assume: str | None = None) -> ModelSpec | UserError:
    path.write_text(json.dumps(config))
    try:
        return read_config(path, assume=assume)
    except UserError as error:
        return error


@settings(deadline=None, max_examples=100)
@given(config=mutated_configs(), assume=st.none() | st.sampled_from(("mixtral", "deepseek_v3", "llama4_text")))
def test_any_config_is_a_model_or_one_user_error(tmp_path_factory, config, assume):
    path = tmp_path_factory.getbasetemp() / "config.json"
    result = outcome(path, config, assume)
    if isinstance(result, UserError):
        assert str(result).startswith((str(path), "--assume"))
    else:
        assert describe_model(result, seq_len=128).total_parameters > 0


@pytest.mark.parametrize("name", sorted(ONE_OF_EACH_FAMILY.values()))
def test_every_key_of_every_family_withstands_every_kind_of_value(tmp_path, name):
    path, config = tmp_path / "config.json", CONFIGS[name]
    part = config.get("text_config", config)
    for key in part:
        for value in (None, True, -1, 0, 2**40, 1.5, "x", [], ["x"], [[1]], {}, {"a": 1}):
            changed = part | {key: value}
            result = outcome(path, changed if part is config else config | {"text_config": changed})
            assert isinstance(result, ModelSpec) or str(result).startswith(f"{path}: ")

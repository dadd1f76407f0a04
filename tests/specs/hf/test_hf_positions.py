"""Which numbers of a head turn with their position, in which layers, and how positions are stretched."""

import json

import pytest

from pipermoe.runtime.support import check_supported
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.errors import UserError
from pipermoe.specs.model import GroupedQueryAttention, ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

GLM = {
    "model_type": "glm4_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}


def read(tmp_path, **config) -> ModelSpec:
    (tmp_path / "config.json").write_text(json.dumps(GLM | config))
    return ModelSpec.from_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "rotary_dim"),
    [
        ({}, 4),  # the family's own default is half of a head
        ({"partial_rotary_factor": 0.25}, 2),
        ({"partial_rotary_factor": 1.0}, 0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}, 6),
    ],
)
def test_a_part_of_each_head_turns(tmp_path, config, rotary_dim):
    attention = read(tmp_path, **config).attention
    assert isinstance(attention, GroupedQueryAttention)
    assert attention.rotary_dim == rotary_dim


def test_llama_4_has_a_layer_without_positions_after_every_three():
    assert load_model("llama-4-scout").no_rope_layers == tuple(range(3, 48, 4))


def test_a_stretching_that_the_runtime_does_not_know_is_refused_by_name(tmp_path):
    model = read(tmp_path, rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]})
    assert model.attention.rope_stretch == "longrope"
    with pytest.raises(UserError, match=r"attention\.rope_stretch = 'longrope'.*does not turn positions like that"):
        check_supported(model, TrainConfig(seq_len=8, global_batch_size=1), Strategy())

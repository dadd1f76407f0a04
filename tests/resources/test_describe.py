"""A description adds up: its parts are its totals, in every model of the catalogue."""

import pytest

from pipermoe.resources.describe import Description, describe_model
from pipermoe.specs.catalogue import load_model, model_names
from pipermoe.specs.errors import UserError


@pytest.mark.parametrize("name", model_names())
def test_components_and_layers_add_up_to_the_totals(name):
    description = describe_model(load_model(name), seq_len=4096)
    parts = {part.component: part for part in description.components}
    assert sum(part.parameters for part in parts.values()) == description.total_parameters
    assert sum(part.active_parameters for part in parts.values()) == description.active_parameters
    assert sum(part.forward_flops_full for part in parts.values()) == description.flops_per_token.forward_full

    layers = sum(len(kind.layers) * kind.parameters for kind in description.layers)
    final_norm = description.model.hidden_size * (2 if description.model.norm_bias else 1)
    assert layers + parts["embedding"].parameters + parts["head"].parameters + final_norm == (
        description.total_parameters
    )
    in_layers = sum(len(kind.layers) * kind.forward_flops_full for kind in description.layers)
    assert in_layers + parts["head"].forward_flops_full == description.flops_per_token.forward_full
    assert sorted(i for kind in description.layers for i in kind.layers) == list(range(description.model.num_layers))


@pytest.mark.parametrize("name", ["deepseek-v3", "llama-4-maverick", "tiny-moe"])
def test_the_json_is_the_description(name):
    description = describe_model(load_model(name), seq_len=1000)
    assert Description.model_validate_json(description.model_dump_json(exclude_none=True)) == description


def test_mixtral_8x7b_in_figures():
    description = describe_model(load_model("mixtral-8x7b"), seq_len=4096)
    assert description.total_parameters == 46_702_792_704
    assert description.active_parameters == 46_702_792_704 - 32 * 6 * 3 * 4096 * 14336
    assert description.expert_parameters == 3 * 4096 * 14336
    assert description.token_bytes.key_value_cache == 131_072  # 2 x 8 heads x 128 x 32 layers x 2 bytes
    assert description.token_bytes.dispatched == 2 * 2 * 4096
    assert description.token_bytes.expert_inner == 2 * 2 * 3 * 14336
    assert description.token_bytes.hidden_state == 2 * 4096
    assert description.token_bytes.logits == 2 * 32000
    assert description.flops_per_token.forward_backward_full == 3 * description.flops_per_token.forward_full


def test_latent_attention_caches_less_than_a_fiftieth_of_its_heads():  # DeepSeek-V2: 576 numbers instead of 40,960
    size = describe_model(load_model("deepseek-v2")).token_bytes
    assert size.key_value_cache == 60 * 2 * (512 + 64)


def test_an_indexer_caches_its_keys_too():
    size = describe_model(load_model("deepseek-v3.2")).token_bytes
    assert size.key_value_cache == 61 * 2 * (512 + 64 + 128)


def test_multi_token_prediction_stands_apart_from_the_totals():
    with_mtp = load_model("deepseek-v3")
    without = with_mtp.model_copy(update={"mtp_layers": 0})
    described, plain = describe_model(with_mtp), describe_model(without)
    assert described.total_parameters == plain.total_parameters
    assert described.flops_per_token == plain.flops_per_token
    assert described.multi_token_prediction is not None
    assert plain.multi_token_prediction is None


@pytest.mark.parametrize("seq_len", [0, -1, 10**12])
def test_a_sequence_without_tokens_or_without_end_is_refused(seq_len):
    with pytest.raises(UserError, match="seq_len"):
        describe_model(load_model("tiny-moe"), seq_len=seq_len)

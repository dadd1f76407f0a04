"""What every rank holds of parameters, gradients and optimizer state, under every way to divide them."""

import numpy as np
import pytest
from tests.resources.cases import MODEL
from tests.runtime.tiny import MODELS

from pipermoe.resources.parameters import layer_parameters, layer_spread, total_parameters
from pipermoe.resources.stages import stage_shapes
from pipermoe.resources.states import StateElements, state_bytes, state_elements
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.precision import RECIPES, StateBytes
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig


def elements(text: str, model: ModelSpec = MODEL) -> StateElements:
    strategy = Strategy.parse(text)
    table = StrategyTable.of([strategy])
    return state_elements(model, stage_shapes(model, strategy.num_stages, strategy.layer_split), table)


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-30b-a3b", "gpt-oss-120b", "mixtral-8x7b"])
def test_the_ranks_of_a_tensor_parallel_group_hold_the_model_and_copies_of_what_is_replicated(name):
    model, tp = load_model(name), 4
    whole, divided = elements("dp1", model), elements(f"dp1 tp{tp} ep{tp}", model)
    spreads = [layer_spread(model, is_moe=model.is_moe(layer)) for layer in range(model.num_layers)]
    spreads += [layer_spread(model, is_moe=True)] * model.mtp_layers
    norms = (1 + 3 * model.mtp_layers) * model.hidden_size * (2 if model.norm_bias else 1)
    copies = sum(spread.dense_replicated for spread in spreads) + norms
    if model.head_bias or model.vocab_size % tp:
        pytest.skip("the vocabulary is padded")
    assert tp * divided.dense.sum() - whole.dense.sum() == (tp - 1) * copies
    assert tp * divided.expert.sum() == whole.expert.sum()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_spread_counts_every_trained_parameter_once(model):
    untrained = model.moe.num_experts * (model.moe.router.correction_bias == "parameter")
    for layer in range(model.num_layers):
        is_moe = model.is_moe(layer)
        spread = layer_spread(model, is_moe=is_moe)
        counted = spread.dense + spread.dense_replicated + spread.expert + spread.expert_replicated
        assert counted == layer_parameters(model, layer).total - untrained * is_moe


def test_expert_tensor_parallelism_divides_the_matrices_of_an_expert():
    one, two = elements("dp4 ep4"), elements("dp4 ep2 etp2")
    assert one.expert.tolist() == two.expert.tolist()
    assert elements("dp4 ep2 edp2").expert.tolist() == (2 * one.expert).tolist()


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_each_zero_level_shards_one_more_kind_of_state(level):
    plain, sharded = elements("dp4 ep2 edp2"), elements(f"dp4 ep2 edp2 z{level}")
    shard = plain.dense / 4 + plain.expert / 2
    for needed, name in enumerate(("updated", "gradients", "weights"), start=1):
        expected = shard if level >= needed else plain.held
        assert getattr(sharded, name).tolist() == expected.tolist()
    assert sharded.owned.tolist() == shard.tolist()


def test_dense_state_is_shared_by_all_ranks_of_dp_and_cp():
    assert np.isclose(elements("dp2 cp2 ep4 z1").updated, elements("dp4 ep4 z1").updated).all()


@pytest.mark.parametrize(("precision", "total"), [("fp32", 16), ("bf16", 18), ("fp16", 18), ("fp8", 18)])
def test_one_rank_holds_the_bytes_per_parameter_of_its_recipe(precision, total):
    assert RECIPES[precision].state.total == total
    held = state_bytes(elements("dp1"), RECIPES[precision].state)
    assert sum(map(np.sum, held.values())) == total * total_parameters(MODEL)


def test_another_optimizer_is_another_number_of_bytes():
    sgd = StateBytes(weight=2, gradient=2, moments=2)
    train = TrainConfig(seq_len=8, global_batch_size=8, precision="bf16", state_bytes=sgd)
    assert train.recipe.state.total == 6
    assert train.recipe.activation == 2


def test_a_tied_embedding_is_on_the_first_and_the_last_stage_and_once_where_they_are_one():
    tied, untied = MODELS["tied"], MODELS["plain"]
    vocabulary = tied.vocab_size * tied.hidden_size
    for stages, fewer in ((1, vocabulary), (2, 0)):
        strategy = StrategyTable.of([Strategy(pipeline_parallel=stages)])
        shapes = stage_shapes(tied, stages)
        held = [state_elements(model, shapes, strategy).dense.sum() for model in (tied, untied)]
        assert held[1] - held[0] == fewer

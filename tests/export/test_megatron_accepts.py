"""Megatron-LM's own parser, validators, configuration and process groups judge the exported jobs."""

from importlib.util import find_spec

import numpy as np
import pytest
from tests.export.plans import plan_for

from pipermoe.export import export_plan
from pipermoe.export.megatron import environment
from pipermoe.resources.parameters import embedding_parameters, head_parameters, join_parameters
from pipermoe.resources.stages import stage_shapes
from pipermoe.resources.states import state_bytes, state_elements
from pipermoe.specs.catalogue import load_model, model_names
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.megatron import unsupported_parts
from pipermoe.specs.megatron.options import options
from pipermoe.specs.mesh import groups
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.plan import Plan
from pipermoe.specs.strategy_table import StrategyTable

pytestmark = pytest.mark.slow
if find_spec("megatron") is None:
    pytest.skip("needs megatron-core==0.19.2: make test-frameworks", allow_module_level=True)

from tests.export import megatron_oracle as oracle  # noqa: E402

EXPRESSIBLE = [name for name in model_names() if not list(unsupported_parts(load_model(name)))]
DATA = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "255"]


def words_of(plan: Plan) -> list[str]:
    text = export_plan(plan, "megatron", plan.strategy.world_size).files["megatron.args"]
    return [word for line in text.splitlines() if not line.startswith("#") for word in line.split()]


def accepted(plan: Plan, extra: tuple[str, ...] = ()):
    wanted = Configuration(model=plan.model, train=plan.train, strategy=plan.strategy)
    return oracle.accept([*words_of(plan), *DATA, *extra], plan.strategy.world_size, environment(wanted))


def test_the_frozen_list_is_that_of_the_parser():
    assert oracle.registered_options() == {flag: option.name for flag, option in options().items()}


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_megatron_accepts_every_model_that_is_exported(name):
    parsed = accepted(plan_for("pp2 dp4 ep4 mbs1 1f1b z1/0", model=load_model(name)))
    assert parsed.data_parallel_size == 4


@pytest.mark.parametrize(
    "text",
    [
        "pp1 dp8 ep8 mbs2 1f1b z1/0",
        "pp4 dp4 ep2 edp2 mbs1 1f1b z1 full",
        "pp2 vpp2 dp4 tp2 ep4 edp2 mbs1 interleaved-1f1b z1 selective:norm,moe_act",
        "pp2 vpp2 dp4 cp2 tp2 ep4 edp2 etp2 mbs1 interleaved-1f1b-overlap z1",
        "pp3 dp4 ep4 mbs1 1f1b z1/0 split:2,3,3",
        "pp1 dp4 ep4 mbs1 1f1b-overlap z1/0 selective:norm,moe_act,dense_mlp deduplicated",
        "pp2 dp4 ep2 edp2 mbs1 1f1b z2",
        "pp1 dp4 tp2 ep4 edp2 mbs1 1f1b z3 full",
        "pp2 dp4 cp2 ep2 edp4 mbs1 1f1b z1",
        "pp2 dp1 ep1 mbs1 1f1b",
        "pp2 dp2 tp2 ep2 edp2 mbs1 1f1b z1 pp-dp",
        "pp2 dp4 cp2 tp2 ep2 etp2 edp4 mbs1 1f1b z1 pp-dp",
    ],
)
def test_megatron_accepts_a_strategy_and_groups_its_ranks_as_we_do(text):
    plan = plan_for(text)
    parsed = accepted(plan)
    found = oracle.rank_groups(parsed, plan.strategy.world_size)
    assert found == {axis: set(groups(plan.strategy, axis)) for axis in found}


@pytest.mark.parametrize(
    "train",
    [
        {"precision": "fp32"},
        {"precision": "fp16"},
        {"precision": "fp8"},
        {"capacity_factor": 1.25},
        {"auxiliary_loss": 0.0, "z_loss": 1e-3},
        {"auxiliary_loss_level": "global_batch"},
        {"state_bytes": {"weight": 2, "gradient": 2, "master": 4, "moments": 4}},
    ],
)
def test_megatron_accepts_every_kind_of_job(train):
    assert accepted(plan_for("pp1 dp8 ep8 mbs1 1f1b z1/0", **train))


@pytest.mark.parametrize(
    ("text", "extra", "error"),
    [
        ("pp1 dp8 ep8 mbs1 1f1b z1/0", ("--expert-parallel", "8"), SystemExit),  # no such option
        ("pp1 dp8 ep8 mbs1 1f1b z1/0", ("--expert-model-parallel-size", "48"), AssertionError),
        ("pp2 dp4 ep4 mbs1 1f1b z1/0", ("--overlap-moe-expert-parallel-comm",), AssertionError),
        ("pp1 dp8 ep8 mbs1 1f1b-overlap z1/0", ("--recompute-granularity", "full"), ValueError),
        ("pp2 dp4 ep4 mbs1 1f1b z1/0", ("--pipeline-model-parallel-layout", "Et*3|t*4L"), AssertionError),
        ("pp2 dp4 ep4 mbs1 1f1b z1/0", ("--pipeline-model-parallel-layout", "Et*3|t*3|t*2L"), AssertionError),
    ],
)
def test_the_judge_refuses_what_is_wrong(text, extra, error):
    with pytest.raises(error):
        accepted(plan_for(text), extra)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3-30b-a3b", "pp4 dp16 ep8 edp2 mbs1 1f1b z1"),
        ("qwen3-30b-a3b", "pp4 vpp3 dp16 ep8 edp2 mbs1 interleaved-1f1b z1"),
        ("qwen3-235b-a22b", "pp2 dp16 tp4 ep16 edp4 mbs1 1f1b z1"),
        ("mixtral-8x7b", "pp4 dp8 tp2 ep8 etp2 mbs1 1f1b z1/0"),
        ("mixtral-8x22b", "pp8 dp4 tp2 ep8 mbs1 1f1b z1/0"),
        ("qwen2-57b-a14b", "pp1 dp8 ep8 mbs1 1f1b z1/0"),
        ("mixtral-8x7b", "pp4 dp8 ep8 mbs1 1f1b"),
        ("deepseek-v2", "pp4 dp16 ep16 mbs1 1f1b z1/0"),
        ("deepseek-v3", "pp16 dp64 ep64 mbs1 1f1b z1/0"),
    ],
)
def test_weights_and_optimizer_state_take_the_bytes_that_megatron_reports(name, text):
    plan = plan_for(text, model=load_model(name), global_batch_size=1024)
    theirs = oracle.weight_and_optimizer_bytes(accepted(plan))
    assert bytes_of_mean_stage(plan) == pytest.approx(theirs, rel=0.01)


def bytes_of_mean_stage(plan: Plan) -> float:
    """Ours of the rank with the embedding, if its stage had the mean layer: Megatron takes layers to be equal.

    Where they are (all MoE, an even split), the mean is what every stage has. Prediction layers are counted whole, but
    without what joins them to the model: Megatron's estimate leaves out its projection and norms.
    """
    strategy = plan.strategy

    def on_one_stage(model: ModelSpec) -> float:
        flat = strategy.model_copy(
            update={"pipeline_parallel": 1, "virtual_stages": 1, "schedule": "1f1b", "layer_split": ()}
        )
        table = StrategyTable.of([flat])
        elements = state_elements(model, stage_shapes(model, 1), table)
        return sum(float(np.sum(part)) for part in state_bytes(elements, plan.train.recipe.state).values())

    whole = on_one_stage(plan.model)
    if strategy.pipeline_parallel == 1:
        return whole
    # Embedding and head are equal: their bytes are what a vocabulary of twice the size adds.
    vocabulary = on_one_stage(plan.model.model_copy(update={"vocab_size": 2 * plan.model.vocab_size})) - whole
    ahead = whole - on_one_stage(plan.model.model_copy(update={"mtp_layers": 0}))
    joins = plan.model.mtp_layers * sum(join_parameters(plan.model))
    joining = vocabulary * joins / (embedding_parameters(plan.model) + head_parameters(plan.model))
    return (whole - vocabulary - ahead) / strategy.pipeline_parallel + vocabulary / 2 + ahead - joining

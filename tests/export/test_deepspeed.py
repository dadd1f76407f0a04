"""The DeepSpeed job of a plan: its configuration, what it refuses, and the way back."""

import json

import pytest
from tests.export.plans import MODEL, assert_refused_for, plan_for

from pipermoe.export import export_plan
from pipermoe.export.deepspeed.reading import check_keys
from pipermoe.export.reading import read_job
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.errors import UserError

QWEN = load_model("qwen3-30b-a3b")


def job_of(text, **changes):
    plan = plan_for(text, **{"model": QWEN, **changes})
    return plan, export_plan(plan, "deepspeed", plan.strategy.world_size)


def configuration(text, **changes):
    return json.loads(job_of(text, **changes)[1].files["deepspeed.json"])


PLANS = [
    "pp1 dp8 ep8 mbs2 1f1b z2/0",
    "pp1 dp8 ep4 edp2 mbs1 1f1b z3 full",
    "pp1 dp4 tp2 ep4 edp2 mbs1 1f1b z1 deduplicated",
    "pp1 dp8 ep8 mbs1 1f1b",
]


@pytest.mark.parametrize("text", PLANS)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_an_exported_configuration_is_read_back_as_the_same_plan(text, precision, tmp_path):
    plan, job = job_of(text, precision=precision)
    (tmp_path / "deepspeed.json").write_text(job.files["deepspeed.json"])
    read = read_job("deepspeed", [str(tmp_path / "deepspeed.json")], plan.strategy.world_size)
    assert (read.strategy, read.train, read.model) == (plan.strategy, plan.train, plan.model)


@pytest.mark.parametrize("text", PLANS)
def test_the_batch_is_the_product_that_deepspeed_asks_for(text):
    plan, _ = job_of(text)
    given = configuration(text)
    product = given["train_micro_batch_size_per_gpu"] * given["gradient_accumulation_steps"]
    assert given["train_batch_size"] == product * plan.strategy.data_parallel == plan.train.global_batch_size


def test_every_written_key_is_known_and_the_version_is_said():
    for text in PLANS:
        given = configuration(text)
        check_keys(given, "deepspeed.json")
        assert given["pipermoe"]["tested_with"] == "DeepSpeed 0.19.8"


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("pp2 dp8 ep8 mbs1 1f1b z2/0", "pipeline_parallel", "pp1 dp16 ep8 edp2 mbs1 1f1b z2"),
        ("pp1 dp4 cp2 ep8 mbs1 1f1b z2/0", "context_parallel", "pp1 dp8 ep8 mbs1 1f1b z2/0"),
        ("pp1 dp8 ep8 mbs1 gpipe z2/0", "schedule", "pp1 dp8 ep8 mbs1 1f1b z2/0"),
        ("pp1 dp4 tp2 ep4 etp2 mbs1 1f1b z2/0", "expert_tensor_parallel", "pp1 dp4 tp2 ep4 edp2 mbs1 1f1b z2"),
        ("pp1 dp8 ep8 mbs1 1f1b z2/0 selective:norm", "recompute", "pp1 dp8 ep8 mbs1 1f1b z2/0 full"),
        ("pp1 dp8 ep4 edp2 mbs1 1f1b z2/0", "zero_expert", "pp1 dp8 ep4 edp2 mbs1 1f1b z2"),
    ],
)
def test_what_deepspeed_cannot_express_is_refused_with_the_nearest_that_it_can(text, key, nearest):
    assert_refused_for(job_of, text, key, nearest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model": MODEL}, "AutoEP has presets of"), ({"precision": "fp8"}, "trains in fp32, bf16, fp16")],
)
def test_a_model_or_job_that_deepspeed_lacks_is_refused(changes, message):
    with pytest.raises(UserError) as error:
        job_of("pp1 dp8 ep8 mbs1 1f1b z2/0", **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_optimisation": {"stage": 2}}, "would ignore it; did you mean zero_optimization?"),
        ({"expert_parallel": {"enabled": True, "ep_size": 8}}, "expert_parallel.ep_size: DeepSpeed 0.19.8 does not"),
        ({"expert_parallel": 8}, "expert_parallel = 8: must be a table"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 3}}, "--world-size = 8: must be a multiple"),
        ({"train_batch_size": 100}, "train_batch_size = 100: must be train_micro_batch_size_per_gpu * "),
        ({"train_batch_size": "auto"}, "values such as 'auto' are not read"),
        ({"zero_optimization": {"stage": 7}}, "zero_dense = 7"),
        ({"optimizer": {"params": {"lr": "auto"}}}, "lr = 'auto'"),
        ({"pipermoe": {}}, "give --model and --seq-len"),
    ],
)
def test_an_error_names_the_key(changes, message, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(configuration(PLANS[0]) | changes))
    with pytest.raises(UserError) as error:
        read_job("deepspeed", [str(path)], 8)
    assert message in str(error.value)


def test_a_foreign_configuration_is_read_for_a_given_model(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}, "steps_per_print": 10}')
    read = read_job("deepspeed", [str(path)], 8, model="mixtral-8x7b", seq_len=2048)
    assert str(read.strategy.compact()) == "pp1 dp8 ep1 edp8 z3"
    assert read.train.global_batch_size == 32
    assert read.remarks == ("steps_per_print: has no counterpart here",)

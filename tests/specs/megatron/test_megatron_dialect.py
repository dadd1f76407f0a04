import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipermoe.specs.catalogue import load_model, model_names
from pipermoe.specs.errors import UserError
from pipermoe.specs.megatron import Arguments, read_configuration, unsupported_parts, write_arguments
from pipermoe.specs.megatron.options import options
from pipermoe.specs.megatron.patterns import Layout, read_flags, read_layout, write_flags
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import Optimizer, TrainConfig

TRAIN = TrainConfig(
    seq_len=4096,
    global_batch_size=256,
    precision="bf16",
    auxiliary_loss_level="sequence",
    z_loss=1e-3,
    optimizer=Optimizer(learning_rate=1e-4, beta2=0.98),
)
EXPRESSIBLE = [name for name in model_names() if not list(unsupported_parts(load_model(name)))]


def round_trip(model, strategy: Strategy, train: TrainConfig = TRAIN):
    words = [word for words in write_arguments(model, train, strategy).words() for word in words]
    return read_configuration(Arguments.parse(words), strategy.world_size, model.name)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_a_model_of_the_catalogue_is_read_back_from_its_arguments(name):
    model = load_model(name)
    read = round_trip(model, Strategy.parse("pp1 dp4 ep4 mbs1 1f1b")).model
    assert read == model.model_copy(update={"source": ""})


@pytest.mark.parametrize(
    "text",
    [
        "pp1 dp8 ep8 mbs2 1f1b z1/0",
        "pp4 dp8 ep4 edp2 mbs1 1f1b z1 full",
        "pp2 vpp3 dp4 tp2 ep8 mbs1 interleaved-1f1b z1/0 selective:norm,moe_act",
        "pp2 vpp2 dp4 cp2 tp2 ep4 edp2 etp2 mbs1 interleaved-1f1b-overlap z1",
        "pp3 dp4 ep4 mbs4 1f1b z1/0 split:15,17,16",
        "pp1 dp8 ep4 edp2 mbs1 1f1b-overlap z2 deduplicated",
        "pp1 dp8 ep4 edp2 mbs1 1f1b z3",
        "pp2 dp1 ep1 mbs1 1f1b",
    ],
)
def test_a_strategy_is_read_back_from_its_arguments(text):
    strategy = Strategy.parse(text)
    read = round_trip(load_model("qwen3-30b-a3b"), strategy)
    assert read.strategy == strategy
    assert read.remarks == ()


@pytest.mark.parametrize(
    "train",
    [
        TRAIN,
        TRAIN.model_copy(update={"precision": "fp32", "auxiliary_loss": 0.0, "auxiliary_loss_level": "micro_batch"}),
        TRAIN.model_copy(update={"capacity_factor": 1.25}),
    ],
)
def test_a_job_is_read_back_from_its_arguments(train):
    assert round_trip(load_model("mixtral-8x7b"), Strategy.parse("pp1 dp4 ep4 mbs1 1f1b"), train).train == train


def read_strategy(extra: str, world_size: int = 8, layers: int = 8):
    given = f"--num-layers {layers} --hidden-size 64 --num-attention-heads 4 --num-experts 8 --vocab-size 100"
    required = "--seq-length 32 --global-batch-size 64 --micro-batch-size 1"
    return read_configuration(Arguments.parse(f"{given} {required} {extra}".split()), world_size)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        # Without --expert-tensor-parallel-size experts are split as attention is.
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size 4", "pp1 dp4 tp2 ep4 etp2 mbs1 1f1b z0"),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2", "pp2 vpp2 dp4 ep1"),
        ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 4", "pp2 vpp4 dp4 ep1"),
        ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 5", "pp4 dp2 ep1 split:5,1,1,1"),
        (
            "--pipeline-model-parallel-size 5 --account-for-embedding-in-pipeline-split "
            "--account-for-loss-in-pipeline-split",
            "pp5 dp1 ep1 split:1,2,2,2,1",
        ),
        (
            "--recompute-granularity selective --recompute-modules moe_act layernorm",
            "selective:norm,moe_act pp1 dp8 ep1",
        ),
        ("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads", "pp1 dp8 ep1 z2"),
        ("--use-distributed-optimizer --expert-model-parallel-size 8", "pp1 dp8 ep8 z1/0"),
    ],
)
def test_what_megatron_derives_is_derived(extra, text):
    world_size = 5 if "size 5" in extra else 8
    read = read_strategy(extra, world_size).strategy
    expected = Strategy.parse(text)
    schedule = "interleaved-1f1b" if expected.virtual_stages > 1 else "1f1b"
    assert read == expected.model_copy(update={"schedule": schedule, "micro_batch_size": 1})


def test_what_has_no_counterpart_is_remarked():
    read = read_strategy("--recompute-granularity selective --moe-token-dispatcher-type allgather")
    assert len(read.remarks) == 2
    assert read.strategy.recompute == "none"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--tensor-model-paralel-size 2", "no such option; did you mean --tensor-model-parallel-size?"),
        ("--tensor-model-parallel-size two", "must be an integer"),
        ("--moe-token-dispatcher-type alltoal", "accepted: allgather, alltoall, flex"),
        ("--bf16 yes", "--bf16: takes no value"),
        ("--num-experts", "--num-experts: takes one value"),
        ("--tensor-model-parallel-size 3", "must be a multiple of the tensor, context and pipeline parallel sizes"),
        (
            "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|tttttx",
            "must be stages of E, t, m, L",
        ),
        ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Etttt|tt|ttL", "3 stages"),
        ("--moe-layer-freq [0]*3+[1]*9", "8 layers"),
        ("--num-experts 0", "moe.num_experts = 0"),
        ("--moe-layer-freq __import__('os')", "8 layers"),
    ],
)
def test_an_error_names_the_option_and_what_is_accepted(extra, message):
    with pytest.raises(UserError) as error:
        read_strategy(extra)
    assert message in str(error.value)


def test_a_recipe_in_yaml_is_read_like_a_command_line():
    recipe = json.loads('{"num-layers": 4, "moe_grouped_gemm": true, "bf16": "true", "swiglu": false}')
    recipe |= {"recompute-modules": '"[layernorm moe_act]"'}
    words = ["--num-layers", "4", "--moe-grouped-gemm", "--bf16", "--recompute-modules", "layernorm", "moe_act"]
    assert Arguments.of(recipe) == Arguments.parse(words)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=80))
@settings(deadline=None, max_examples=100)
def test_lists_of_layers_are_read_back(values):
    assert read_flags(write_flags(values), len(values), "--moe-layer-freq", first=0) == values


def test_lists_of_layers_are_read_as_megatron_documents_them():
    assert read_flags("([1]*3+[0]*1)*3", 12, "--moe-layer-freq", first=0) == [1, 1, 1, 0] * 3
    assert read_flags("2", 4, "--moe-layer-freq", first=0) == [1, 0, 1, 0]
    assert read_flags("3", 7, "--window-attn-skip-freq", first=-1) == [0, 0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("text", "decoder", "mtp"),
    [
        ("Et*6|t*6|t*6L", (6, 6, 6), (0, 0, 0)),
        ("Et*3|(tt|)*5t|tmL", (3, 2, 2, 2, 2, 2, 1, 1), (0,) * 7 + (1,)),
        ("E|(t|)*3,m|m||L", (0, 1, 1, 1, 0, 0, 0, 0), (0, 0, 0, 0, 1, 1, 0, 0)),
    ],
)
def test_layouts_are_read_as_megatron_documents_them(text, decoder, mtp):
    assert read_layout(text) == Layout(decoder, mtp)
    assert read_layout(str(read_layout(text))) == Layout(decoder, mtp)


def test_every_option_of_the_frozen_list_is_complete():
    assert len(options()) == 845
    assert all(option.takes_value or option.kind in ("on", "off") for option in options().values())

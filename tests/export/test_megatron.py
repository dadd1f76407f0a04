"""The Megatron-LM job of a plan: its files, what it refuses, and the way back."""

import subprocess

import pytest
from tests.export.plans import plan_for
from tests.resources.cases import machine

from pipermoe.export import export_plan
from pipermoe.export.reading import read_job
from pipermoe.specs.errors import UserError
from pipermoe.specs.megatron.options import options
from pipermoe.specs.model import Router
from pipermoe.specs.precision import StateBytes

PLANS = [
    "pp1 dp8 ep8 mbs2 1f1b z1/0",
    "pp4 dp4 ep2 edp2 mbs1 1f1b z1 full",
    "pp2 vpp2 dp4 tp2 ep4 edp2 mbs1 interleaved-1f1b z1 selective:norm,moe_act",
    "pp2 vpp2 dp4 cp2 tp2 ep4 edp2 etp2 mbs1 interleaved-1f1b-overlap z1",
    "pp3 dp4 ep4 mbs1 1f1b z1/0 split:2,3,3",
    "pp1 dp8 ep4 edp2 mbs1 1f1b-overlap z2 deduplicated",
    "pp2 dp2 tp2 ep2 edp2 mbs1 1f1b z1 pp-dp",
]


@pytest.mark.parametrize("text", PLANS)
def test_an_exported_job_is_read_back_as_the_same_plan(text, tmp_path):
    plan = plan_for(text)
    job = export_plan(plan, "megatron", 8 if plan.strategy.world_size % 8 == 0 else 4)
    (tmp_path / "megatron.args").write_text(job.files["megatron.args"])
    read = read_job("megatron", [str(tmp_path / "megatron.args")], plan.strategy.world_size)
    assert read.strategy == plan.strategy
    assert read.train == plan.train
    assert read.model.model_copy(update={"name": plan.model.name}) == plan.model
    assert read.remarks == ()


def test_optimizer_state_of_fewer_bytes_is_exported():
    state = StateBytes(weight=2, gradient=2, master=4, moments=4)
    plan = plan_for("pp1 dp8 ep8 mbs1 1f1b z1/0", state_bytes=state)
    text = export_plan(plan, "megatron", 8).files["megatron.args"]
    words = " ".join(line for line in text.splitlines() if not line.startswith("#")).split()
    assert "--use-precision-aware-optimizer" in words
    assert read_job("megatron", words, 8).train == plan.train


def test_every_exported_option_is_on_the_frozen_list():
    for text in PLANS:
        plan = plan_for(text)
        lines = export_plan(plan, "megatron", plan.strategy.world_size).files["megatron.args"].splitlines()
        assert {line.split()[0] for line in lines if not line.startswith("#")} <= set(options())


def test_every_file_says_what_wrote_it_and_what_it_was_tested_with():
    for name, text in export_plan(plan_for(PLANS[0]), "megatron", 8).files.items():
        assert "tested with Megatron-LM 0.19.2" in text, name


def test_the_launch_script_prints_its_command_and_asks_for_what_it_needs(tmp_path):
    plan = plan_for("pp2 dp8 ep8 mbs1 1f1b z1/0")
    for name, text in export_plan(plan, "megatron", 8).files.items():
        (tmp_path / name).write_text(text)
    script = ["bash", str(tmp_path / "launch.sh"), "--save", "here"]
    missing = subprocess.run(script, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert missing.returncode != 0
    assert "MEGATRON: set it to the folder" in missing.stderr
    given = {"PATH": "/usr/bin:/bin", "MEGATRON": "/opt/megatron", "DRY_RUN": "1", "NODE_RANK": "1"}
    printed = subprocess.run(script, env=given, capture_output=True, text=True, check=True).stdout.replace("\\", "")
    assert printed.startswith("torchrun --nnodes 2 --nproc-per-node 8 --node-rank 1 ")
    assert "/opt/megatron/pretrain_gpt.py --num-layers 8 " in printed
    assert "--pipeline-model-parallel-layout Et*4|t*4L" in printed
    assert printed.rstrip().endswith("--save here")


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("pp4 vpp2 dp8 ep8 mbs1 zb-v z1/0", "schedule", "pp4 vpp2 dp8 ep8 mbs1 interleaved-1f1b z1/0"),
        ("pp4 vpp2 dp8 ep8 mbs1 dualpipe-v z1/0", "schedule", "pp4 vpp2 dp8 ep8 mbs1 interleaved-1f1b-overlap z1/0"),
        ("pp1 dp8 ep8 mbs1 1f1b z1/0 planned", "exchange", "pp1 dp8 ep8 mbs1 1f1b z1/0"),
        ("pp4 dp8 ep8 mbs1 gpipe z1/0", "schedule", "pp4 dp8 ep8 mbs1 1f1b z1/0"),
        ("pp4 dp8 ep8 mbs1 zb-h1 z1/0 split:3,2,2,1", "schedule", "pp4 dp8 ep8 mbs1 1f1b z1/0 split:3,2,2,1"),
        ("pp4 dp8 ep8 mbs1 1f1b-overlap z1/0", "schedule", "pp4 vpp2 dp8 ep8 mbs1 interleaved-1f1b-overlap z1/0"),
        ("pp1 dp8 ep8 mbs1 1f1b-overlap z1/0 full", "schedule", "pp1 dp8 ep8 mbs1 1f1b z1/0 full"),
        ("pp1 dp8 ep4 edp2 mbs1 1f1b z1/0", "zero_expert", "pp1 dp8 ep4 edp2 mbs1 1f1b z1"),
        ("pp1 dp8 ep8 mbs1 1f1b z1/0 selective:experts", "recompute_modules", "pp1 dp8 ep8 mbs1 1f1b z1/0 full"),
        ("pp2 dp8 ep4 edp2 mbs1 1f1b z1 pp-dp", "rank_order", "pp2 dp8 ep4 edp2 mbs1 1f1b z1"),
        ("pp4 vpp2 dp4 ep4 mbs16 interleaved-1f1b", "micro_batch_size", "pp4 vpp2 dp4 ep4 mbs4 interleaved-1f1b z0"),
    ],
)
def test_what_megatron_cannot_express_is_refused_with_the_nearest_that_it_can(text, key, nearest):
    with pytest.raises(UserError) as error:
        export_plan(plan_for(text), "megatron", 8, where="plan.toml")
    assert str(error.value).startswith(f"plan.toml: strategy.{key} = ")
    assert f"; nearest: '{nearest}', not priced without --platform" in str(error.value)
    assert export_plan(plan_for(nearest), "megatron", 8).files


def test_the_nearest_plan_is_priced_on_the_platform():
    plan = plan_for("pp2 dp2 ep2 mbs1 gpipe z1/0", precision="fp32", seq_len=64, global_batch_size=16)
    with pytest.raises(UserError, match=r"1f1b z1/0', predicted .* s a step and .* GiB on machine \(this plan: "):
        export_plan(plan, "megatron", 4, platform=machine(ranks=4))


def test_a_nearest_plan_that_does_not_fit_says_so():
    plan = plan_for("pp2 dp2 ep2 mbs1 gpipe z1/0", precision="fp32", seq_len=64, global_batch_size=16)
    small = machine(ranks=4)
    small = small.model_copy(update={"device": small.device.model_copy(update={"memory_bytes": 2**20})})
    with pytest.raises(UserError, match=r"GiB on machine, which its 1\.00 MiB do not hold \(this plan: "):
        export_plan(plan, "megatron", 4, platform=small)


def test_where_the_platform_has_no_price_the_reason_stands_in_its_place():
    plan = plan_for("pp2 dp2 ep2 mbs1 gpipe z1/0", precision="bf16", seq_len=64, global_batch_size=16)
    with pytest.raises(UserError, match=r"schedule = 'gpipe'.*nearest: .*, not priced: .*precision = 'bf16'"):
        export_plan(plan, "megatron", 4, platform=machine(ranks=4))


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({"norms_per_layer": 4}, {}, "model.norms_per_layer = 4: Megatron-LM 0.19.2: Megatron's layers have 2"),
        ({"head_bias": True}, {}, "model.head_bias = True"),
        ({"moe.router": Router(score="sigmoid", normalize_top_k=False)}, {}, "model.moe.router.normalize_top_k"),
        ({}, {"state_bytes": StateBytes(weight=1, gradient=2, master=2)}, "weight and master take 2 and 4 bytes"),
    ],
)
def test_a_model_or_state_without_arguments_is_refused(model, train, message):
    with pytest.raises(UserError) as error:
        export_plan(plan_for("pp1 dp8 ep8 mbs1 1f1b", model=model, **train), "megatron", 8)
    assert message in str(error.value)


def test_ranks_per_node_must_divide_the_plans_ranks():
    with pytest.raises(UserError, match=r"--ranks-per-node = 3: must divide the plan's 8 ranks"):
        export_plan(plan_for(PLANS[0]), "megatron", 3)

"""The torchtitan job of a plan: its module and schedule, what it refuses, and the way back."""

import ast

import pytest
from tests.export.plans import MODEL, assert_refused_for, plan_for

from pipermoe.export import export_plan
from pipermoe.export.reading import read_job
from pipermoe.schedule.builders import build
from pipermoe.schedule.torch_csv import read_csv
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.errors import UserError

QWEN = load_model("qwen3-30b-a3b")


def job_of(text, **changes):
    plan = plan_for(text, **{"model": QWEN, **changes})
    return plan, export_plan(plan, "torchtitan", plan.strategy.world_size)


@pytest.mark.parametrize(
    "text",
    [
        "pp4 vpp2 dp8 ep8 mbs1 interleaved-1f1b z2/0",
        "pp4 vpp2 dp8 ep8 mbs1 v-half z2/0",
        "pp4 dp4 tp2 ep4 edp2 mbs2 zb-h1 z3 full split:10,13,13,12",
        "pp1 dp8 ep4 edp2 mbs2 1f1b z3",
        "pp1 dp4 tp2 ep1 edp4 etp2 mbs1 1f1b z0",
        "pp2 dp1 ep1 mbs1 gpipe",
    ],
)
def test_an_exported_module_is_read_back_as_the_same_plan(text, tmp_path):
    plan, job = job_of(text)
    (tmp_path / "plan.py").write_text(job.files["pipermoe_plan.py"])
    read = read_job("torchtitan", [str(tmp_path / "plan.py")], plan.strategy.world_size)
    assert read.strategy == plan.strategy
    assert read.model == plan.model
    assert read.train.optimizer == plan.train.optimizer
    assert (read.train.seq_len, read.train.global_batch_size) == (plan.train.seq_len, plan.train.global_batch_size)
    assert read.train.precision == plan.train.precision


@pytest.mark.parametrize("name", ["zb-h1", "v-half", "breadth-first", "1f1b-overlap"])
def test_a_schedule_that_torch_lacks_goes_as_csv(name, tmp_path):
    chunks = "vpp2 " if name in ("v-half", "breadth-first") else ""
    plan, job = job_of(f"pp4 {chunks}dp2 ep2 mbs2 {name} z2/0")
    path = tmp_path / f"{name}.csv"
    path.write_text(job.files[f"{name}.csv"])
    assert read_csv(path) == build(name, 4, 16, plan.strategy.virtual_stages)
    placement = "ZBVZeroBubble" if name == "v-half" else "Interleaved1F1B" if chunks else "1F1B"
    assert f"pipeline_parallel_schedule='{placement}'" in job.files["pipermoe_plan.py"]
    assert f"pipeline_parallel_schedule_csv='{name}.csv'" in job.files["pipermoe_plan.py"]


def test_interleaving_in_uneven_rounds_which_torch_refuses_goes_as_csv():
    _, even = job_of("pp4 vpp2 dp8 ep8 mbs1 interleaved-1f1b z2/0")
    _, uneven = job_of("pp4 vpp2 dp8 ep8 mbs1 interleaved-1f1b z2/0", global_batch_size=8 * 9)
    assert "interleaved-1f1b.csv" not in even.files
    assert "interleaved-1f1b.csv" in uneven.files


def test_the_module_is_python_and_says_what_it_was_tested_with():
    _, job = job_of("pp4 dp4 ep4 mbs1 zb-h1 z2/0")
    ast.parse(job.files["pipermoe_plan.py"])
    assert all("tested with torchtitan 0.3.0" in text for name, text in job.files.items() if not name.endswith(".csv"))


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("pp1 dp8 ep8 mbs1 1f1b z1/0", "zero_dense", "pp1 dp8 ep8 mbs1 1f1b z2/0"),
        ("pp1 dp8 ep4 edp2 mbs1 1f1b z2/3", "zero_dense", "pp1 dp8 ep4 edp2 mbs1 1f1b z3"),
        ("pp2 dp4 tp2 ep4 etp2 mbs1 1f1b z2/0", "expert_tensor_parallel", "pp2 dp4 tp2 ep4 edp2 mbs1 1f1b z2"),
        ("pp2 dp8 ep8 mbs1 dualpipe z2/0", "schedule", "pp2 vpp2 dp8 ep8 mbs1 dualpipe-v z2/0"),
        ("pp1 dp8 ep8 mbs1 gpipe z2/0", "schedule", "pp1 dp8 ep8 mbs1 1f1b z2/0"),
        ("pp1 dp8 ep8 mbs1 1f1b z2/0 selective:norm", "recompute", "pp1 dp8 ep8 mbs1 1f1b z2/0 full"),
        ("pp2 dp8 ep4 edp2 mbs1 1f1b z2 pp-dp", "rank_order", "pp2 dp8 ep4 edp2 mbs1 1f1b z2"),
        ("pp1 dp8 ep8 mbs1 1f1b z2/0 deduplicated", "dispatcher", "pp1 dp8 ep8 mbs1 1f1b z2/0"),
    ],
)
def test_what_torchtitan_cannot_express_is_refused_with_the_nearest_that_it_can(text, key, nearest):
    assert_refused_for(job_of, text, key, nearest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": MODEL}, "registers deepseek-v3, gpt-oss-20b, gpt-oss-120b, qwen3-30b-a3b of the catalogue"),
        ({"model": QWEN.model_copy(update={"num_layers": 24})}, "as they are there"),
        ({"precision": "fp8"}, "trains in fp32, bf16"),
        ({"capacity_factor": 1.0}, "drops no tokens"),
    ],
)
def test_a_model_or_job_that_torchtitan_lacks_is_refused(changes, message):
    with pytest.raises(UserError) as error:
        job_of("pp1 dp8 ep8 mbs1 1f1b z2/0", **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("qwen3_30b_a3b()", "open('/etc/passwd')", "must start from one of"),
        ("seq_len = 1024", "seq_len = length", "'length' is not a literal"),
        ("def plan", "dEf plan", "is not Python"),
        ("schedule_csv='zb-h1.csv'", "schedule_csv='other.csv'", "schedule 'other' is not known"),
    ],
)
def test_code_that_is_no_such_module_is_refused_without_being_run(old, new, message, tmp_path):
    plan, job = job_of("pp4 dp4 ep4 mbs1 zb-h1 z2/0")
    assert old in job.files["pipermoe_plan.py"]
    (tmp_path / "plan.py").write_text(job.files["pipermoe_plan.py"].replace(old, new))
    with pytest.raises(UserError) as error:
        read_job("torchtitan", [str(tmp_path / "plan.py")], plan.strategy.world_size)
    assert message in str(error.value)


def test_a_world_that_the_degrees_do_not_fill_is_refused(tmp_path):
    _, job = job_of("pp4 dp4 ep4 mbs1 zb-h1 z2/0")
    (tmp_path / "plan.py").write_text(job.files["pipermoe_plan.py"])
    with pytest.raises(UserError, match=r"--world-size = 12: the degrees make 16 ranks"):
        read_job("torchtitan", [str(tmp_path / "plan.py")], 12)

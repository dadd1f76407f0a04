"""DeepSpeed's own configuration classes, AutoEP validators and group tables judge the exported jobs."""

import copy
import importlib
import json
import os
from importlib.util import find_spec

import pytest
from tests.export.plans import plan_for

from pipermoe.export import export_plan
from pipermoe.export.deepspeed.names import EXPERT_PARALLEL
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.mesh import groups
from pipermoe.specs.runtimes.deepspeed import PRESETS

pytestmark = pytest.mark.slow
if find_spec("deepspeed") is None:
    pytest.skip("needs deepspeed==0.19.8: make test-frameworks", allow_module_level=True)

os.environ["DS_ACCELERATOR"] = "cpu"
config = importlib.import_module("deepspeed.runtime.config")
auto_ep = importlib.import_module("deepspeed.module_inject.auto_ep_config")
folding = importlib.import_module("deepspeed.module_inject.auto_ep_folding")
config.dist.get_rank = lambda *arguments, **options: 0  # asked for before a process group exists


class Ranks:
    """As much of a model-parallel unit as the configuration asks for."""

    def __init__(self, data_parallel: int) -> None:
        self.data_parallel = data_parallel

    def get_data_parallel_world_size(self) -> int:
        return self.data_parallel


def exported(text: str, name: str = "qwen3-30b-a3b", **train):
    plan = plan_for(text, model=load_model(name), **train)
    return plan, json.loads(export_plan(plan, "deepspeed", plan.strategy.world_size).files["deepspeed.json"])


def judge(given: dict, world_size: int):
    """DeepSpeed's configuration of `given`, after its validators. Raises what DeepSpeed raises."""
    tensor_parallel = given.get("tensor_parallel", {}).get("autotp_size", 1)
    accepted = config.DeepSpeedConfig(copy.deepcopy(given), mpu=Ranks(world_size // tensor_parallel))
    auto_ep.validate_autoep_config(
        auto_ep.parse_autoep_config(given["expert_parallel"]),
        world_size=world_size,
        pp_size=1,
        tp_size=tensor_parallel,
        sp_size=1,
        zero_stage=accepted.zero_optimization_stage,
    )
    return accepted


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    "text",
    [
        "pp1 dp8 ep8 mbs2 1f1b z2/0",
        "pp1 dp8 ep4 edp2 mbs1 1f1b z3 full",
        "pp1 dp4 tp2 ep4 edp2 mbs1 1f1b z1 deduplicated",
        "pp1 dp8 ep8 mbs1 1f1b",
    ],
)
def test_deepspeed_accepts_a_plan_and_groups_its_ranks_as_we_do(text, precision):
    plan, given = exported(text, precision=precision)
    strategy = plan.strategy
    accepted = judge(given, strategy.world_size)
    assert accepted.train_batch_size == plan.train.global_batch_size
    assert accepted.train_micro_batch_size_per_gpu == strategy.micro_batch_size
    spec = folding.build_folding_spec(
        world_size=strategy.world_size,
        pp_size=1,
        tp_size=strategy.tensor_parallel,
        ep_size=strategy.expert_parallel,
    )
    tables = folding.expected_folding_group_tables(spec)
    assert {tuple(ranks) for ranks in tables.ep_groups} == set(groups(strategy, "ep"))
    assert {tuple(ranks) for ranks in tables.edp_groups} == set(groups(strategy, "edp"))


@pytest.mark.parametrize("name", PRESETS)
def test_deepspeed_has_the_preset_of_every_model_that_is_exported(name):
    _, given = exported("pp1 dp4 ep4 mbs1 1f1b z2/0", name)
    assert judge(given, 4)


def test_our_list_of_keys_is_what_deepspeed_reads():
    class Asked(dict):
        """A section that notes which keys are asked for."""

        def __bool__(self) -> bool:
            return True

        def get(self, key, default=None):
            asked.add(key)
            return default

        def __contains__(self, key) -> bool:
            asked.add(key)
            return False

    asked: set[str] = set()
    auto_ep.parse_autoep_config(Asked())
    assert asked == set(EXPERT_PARALLEL)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "train_batch_size", 100),
        ("zero_optimization", "stage", 7),
        ("zero_optimization", "bogus", 1),
        ("expert_parallel", "preset_model", "nothing"),
        ("expert_parallel", "autoep_size", 3),
        ("expert_parallel", "expert_tensor_parallel_size", 2),
        ("expert_parallel", "comm_backend", "mpi"),
    ],
)
def test_the_judge_refuses_what_is_wrong(section, key, value):
    _, given = exported("pp1 dp8 ep8 mbs2 1f1b z2/0")
    (given[section] if section else given)[key] = value
    with pytest.raises((ValueError, AssertionError)):
        judge(given, 8)

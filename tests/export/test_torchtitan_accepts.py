"""torchtitan's own ConfigManager, meshes and Trainer judge the exported jobs."""

from importlib.util import find_spec

import pytest
from tests.export.plans import plan_for

from pipermoe.export import export_plan
from pipermoe.export.torchtitan.module import module_text
from pipermoe.resources.parameters import total_parameters
from pipermoe.schedule.builders import build
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.mesh import Axis, groups
from pipermoe.specs.runtimes.torchtitan import MODELS, Registered

pytestmark = pytest.mark.slow
if find_spec("torchtitan") is None:
    pytest.skip("needs torchtitan==0.3.0: make test-frameworks", allow_module_level=True)

from tests.export import torchtitan_oracle as oracle  # noqa: E402

QWEN = load_model("qwen3-30b-a3b")


def exported(folder, strategy: str, **train):
    plan = plan_for(strategy, model=QWEN, **train)
    for name, text in export_plan(plan, "torchtitan", plan.strategy.world_size).files.items():
        (folder / name).write_text(text)
    return plan


@pytest.mark.parametrize(
    "strategy",
    [
        "pp4 vpp2 dp8 ep8 mbs1 interleaved-1f1b z2/0",
        "pp4 vpp2 dp4 ep4 mbs1 zb-v z2/0 full",
        "pp2 dp4 tp2 cp2 ep4 edp4 mbs1 zb-h1 z3 full split:20,28",
        "pp1 dp8 ep4 edp2 mbs2 1f1b z3",
        "pp1 dp4 tp2 ep1 edp4 etp2 mbs1 1f1b z0",
    ],
)
def test_torchtitan_accepts_a_plan_and_groups_its_ranks_as_we_do(tmp_path, strategy):
    plan = exported(tmp_path, strategy)
    config = oracle.accept(tmp_path)
    found = oracle.rank_groups(config, plan.strategy.world_size)
    ours: dict[str, Axis] = {"pp": "pp", "cp": "cp", "tp": "tp", "ep": "ep", "efsdp": "edp"}
    assert found
    for theirs, ranks in found.items():
        assert ranks == set(groups(plan.strategy, ours[theirs]))


@pytest.mark.parametrize("name", MODELS)
def test_a_registered_model_has_our_parameters(tmp_path, name):
    plan = plan_for("pp1 dp8 ep8 mbs1 1f1b z2/0", model=load_model(name))
    for file, text in export_plan(plan, "torchtitan", 8).files.items():
        (tmp_path / file).write_text(text)
    assert oracle.parameters(oracle.accept(tmp_path)) == total_parameters(plan.model)


def test_the_judge_refuses_what_is_wrong(tmp_path):
    exported(tmp_path, "pp1 dp8 ep8 mbs1 1f1b z2/0")
    with pytest.raises(SystemExit):
        oracle.accept(tmp_path, ("--parallelism.expert_tensor_parallel_degree", "2"))
    config = oracle.accept(tmp_path, ("--parallelism.expert_parallel_degree", "3"))
    with pytest.raises(Exception, match=r"(?i)mesh|size|unflatten"):
        oracle.rank_groups(config, 8)


@pytest.mark.parametrize(
    "strategy",
    ["pp2 vpp2 dp8 ep4 edp2 mbs1 interleaved-1f1b z2", "pp2 dp4 ep4 mbs1 zb-h1 z2/0 full"],
)
def test_torchtitan_builds_the_whole_trainer_with_our_order_of_actions(tmp_path, monkeypatch, strategy):
    """With the registered debug model: a Trainer of the published sizes does not fit one process."""
    plan = exported(tmp_path, strategy, seq_len=256)
    debug = oracle.importlib.import_module("torchtitan.models.deepseek_v3.config_registry").deepseek_v3_debugmodel
    layers = len(debug().model_spec.model.layers)
    small = Configuration(
        model=plan.model.model_copy(update={"num_layers": layers}), train=plan.train, strategy=plan.strategy
    )
    module = module_text(small, Registered("deepseek_v3", "deepseek_v3_debugmodel"))
    (tmp_path / "pipermoe_plan.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    oracle.write_assets(tmp_path)
    extra = ("--comm.mode=fake_backend", "--training.steps", "1", "--parallelism.spmd_backend", "partial_dtensor")
    order = oracle.pipeline_order(oracle.accept(tmp_path, extra), plan.strategy.world_size)
    wanted = build(plan.strategy.schedule, 2, small.microbatches, plan.strategy.virtual_stages)
    assert order == [[str(action) for action in actions] for actions in wanted.ranks]

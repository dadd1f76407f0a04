"""Published weights under an arrangement of ranks: each reads and writes what it holds, the loss is the reference's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.distributed.harness import run_ranks
from tests.modules.hf.test_weights import REFERENCES, TRAIN, published
from tests.modules.hf.tiny_families import CONFIGS, numbers, tokens
from tests.plans import tiny_plan
from tests.runtime.tiny import engine_for

from pipermoe.modules.hf.names import FAMILIES
from pipermoe.modules.hf.weights import INDEX, SINGLE, expected_shapes, load_weights
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.specs.errors import UserError
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.training.checkpoint.hf_weights import save_weights
from pipermoe.training.launch import launch
from pipermoe.training.run import Run

pytestmark = pytest.mark.distributed


def load_step_and_save(rank: int, folder: Path, strategy: Strategy) -> float:
    groups = ProcessGroups.create(strategy)
    engine = engine_for(ModelSpec.from_hf_config(folder), strategy, groups, TRAIN)
    load_weights(folder, engine.model, engine.named_state(), groups.coordinates.ep * engine.local_experts)
    save_weights(folder / "out", engine.model, folder, engine.named_state(), groups)
    batch = tokens().chunk(strategy.data_parallel)[groups.coordinates.dp]
    loss = engine.step(batch[None]).loss
    dist.all_reduce(loss)
    return loss.item()


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("deepseek_v3", Strategy(pipeline_parallel=2, data_parallel=2, expert_parallel=2, schedule="gpipe")),
        ("gpt_oss", Strategy(pipeline_parallel=2, data_parallel=2, expert_parallel=2, schedule="gpipe")),
        ("qwen2_moe", Strategy(data_parallel=2, expert_data_parallel=2)),
    ],
    ids=["deepseek_v3", "gpt_oss", "qwen2_moe"],
)
def test_ranks_load_compute_and_write_together_what_one_would(family: str, strategy: Strategy, tmp_path: Path):
    losses = run_ranks(load_step_and_save, strategy.world_size, published(tmp_path, family), strategy)
    assert losses == [pytest.approx(REFERENCES[family]["loss"], rel=1e-6)] * strategy.world_size
    table = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {INDEX, "config.json", *table.values()}
    written = {}
    for file in set(table.values()):
        tensors = load_file(tmp_path / "out" / file)
        assert all(table[name] == file for name in tensors)
        written |= tensors
    read = load_file(tmp_path / SINGLE)
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in read)


def written_by(run: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in (run / "weights").glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    "arrangement", ["pp2 dp2 ep2 1f1b z1/0 full", pytest.param("pp2 dp2 ep2 dualpipe z3", marks=pytest.mark.slow)]
)
def test_a_run_starts_from_published_weights_resumes_exactly_and_writes_them_again(arrangement: str, tmp_path: Path):
    start = tmp_path / "start"
    start.mkdir()
    (start / "config.json").write_text(
        json.dumps(CONFIGS["deepseek_v3"] | {"vocab_size": 256, "num_nextn_predict_layers": 1})
    )
    model = ModelSpec.from_hf_config(start)
    shapes = expected_shapes(model, FAMILIES["deepseek_v3"])
    save_file({name: numbers(name, shape) for name, shape in shapes.items()}, start / SINGLE)
    plan = tiny_plan(Strategy.parse(arrangement), steps=4, checkpoint_every=2, balance_rate=0.01)
    plan = plan.model_copy(update={"model": model})
    whole = launch(plan, Run(tmp_path / "whole", weights=start, quiet=True))
    launch(plan, Run(tmp_path / "parts", steps=2, weights=start, quiet=True))
    rest = launch(plan, Run(tmp_path / "parts", weights=start, quiet=True), resume=True)
    assert whole is not None
    assert rest is not None
    assert rest.losses == whole.losses[2:]
    trained, resumed = written_by(tmp_path / "whole"), written_by(tmp_path / "parts")
    assert trained.keys() == resumed.keys() == shapes.keys()
    for name, value in trained.items():
        assert torch.equal(value, resumed[name]), name
        assert not torch.equal(value, numbers(name, shapes[name])), name
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    moved = (trained[bias] - numbers(bias, shapes[bias])) / 0.01
    torch.testing.assert_close(moved, moved.round(), rtol=0, atol=1e-3)
    again = tiny_plan(plan.strategy, steps=1).model_copy(update={"model": model})
    assert launch(again, Run(tmp_path / "again", weights=tmp_path / "whole" / "weights", quiet=True)) is not None
    (start / SINGLE).unlink()
    with pytest.raises(UserError, match="holds neither"):
        launch(plan, Run(tmp_path / "never", weights=start))
    assert not (tmp_path / "never").exists()

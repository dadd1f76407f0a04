"""Published weights under an arrangement of ranks: each reads and writes what it holds, the loss is the reference's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.distributed.harness import run_ranks
from tests.runtime.hf_tiny import tokens
from tests.runtime.test_hf_weights import REFERENCES, TRAIN, published
from tests.runtime.tiny import engine_for

from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.hf_weights import INDEX, SINGLE, load_weights, save_weights
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy

pytestmark = pytest.mark.distributed


def load_step_and_save(rank: int, folder: Path, family: str, strategy: Strategy) -> float:
    groups = ProcessGroups.create(strategy)
    engine = engine_for(ModelSpec.from_hf_config(folder), strategy, groups, TRAIN)
    experts = engine.model.moe.num_experts // strategy.expert_parallel
    load_weights(folder, engine.model, engine.named_state(), groups.coordinates.ep * experts)
    save_weights(folder / "out", engine.model, family, engine.named_state(), groups)
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
    losses = run_ranks(load_step_and_save, strategy.world_size, published(tmp_path, family), family, strategy)
    assert losses == [pytest.approx(REFERENCES[family]["loss"], rel=1e-6)] * strategy.world_size
    table = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {INDEX, *table.values()}
    written = {}
    for file in set(table.values()):
        tensors = load_file(tmp_path / "out" / file)
        assert all(table[name] == file for name in tensors)
        written |= tensors
    read = load_file(tmp_path / SINGLE)
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in read)

"""Checkpoints: what one arrangement saves, every other one loads, bit for bit; damage is one clear error."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tests.distributed.harness import run_ranks
from tests.plans import tiny_plan
from torch.nn import Parameter

from pipermoe.runtime.checkpoint import check_resumable, find_newest, load_checkpoint, save_checkpoint
from pipermoe.runtime.checkpoint_format import MetadataReader
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.optimizer import Optimizer
from pipermoe.runtime.weights import is_expert
from pipermoe.specs.errors import UserError
from pipermoe.specs.plan import Plan
from pipermoe.specs.strategy import Strategy

EXPERTS = 4
SHAPES = {
    f"layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "attention.query.weight": (5, 7),
        "norm.weight": (7,),
        "experts.up.weight": (EXPERTS, 3, 7),
    }.items()
}


def values(name: str, kind: str) -> torch.Tensor:
    """A global tensor whose elements tell where they belong."""
    start = 1000 * (list(SHAPES).index(name) + 10 * ("weight", "exp_avg", "exp_avg_sq").index(kind))
    count = int(torch.tensor(SHAPES[name]).prod())
    return torch.arange(start, start + count, dtype=torch.float32).view(SHAPES[name])


def state(groups: ProcessGroups, plan: Plan, *, filled: bool):
    """The parameters and the optimizer of this rank, with the values above or with zeros."""
    strategy, here = plan.strategy, groups.coordinates
    experts = slice(*(EXPERTS // strategy.expert_parallel * n for n in (here.ep, here.ep + 1)))

    def local(name: str, kind: str) -> torch.Tensor:
        return values(name, kind)[experts] if is_expert(name) else values(name, kind)

    held = [name for name in SHAPES if int(name.split(".")[1]) // (2 // strategy.pipeline_parallel) == here.pp]
    weights = {name: Parameter(local(name, "weight") * filled) for name in held}
    optimizer = Optimizer(weights.items(), groups, strategy, plan.train.optimizer)
    if filled:
        for moment, part, slot in optimizer.moment_parts():
            slot.copy_(local(part.name, moment).flatten()[part.start : part.stop])
    return weights, optimizer, local


def save_rank(rank: int, plan: Plan, output: Path, step: int) -> None:
    groups = ProcessGroups.create(plan.strategy)
    weights, optimizer, _ = state(groups, plan, filled=True)
    save_checkpoint(output, step, plan, weights.items(), optimizer, groups)


def load_rank(rank: int, plan: Plan, folder: Path) -> int:
    groups = ProcessGroups.create(plan.strategy)
    weights, optimizer, local = state(groups, plan, filled=False)
    step = load_checkpoint(folder, plan, weights.items(), optimizer, groups)
    for name, weight in weights.items():
        assert torch.equal(weight, local(name, "weight")), name
    for moment, part, slot in optimizer.moment_parts():
        assert torch.equal(slot, local(part.name, moment).flatten()[part.start : part.stop]), (moment, part)
    return step


ARRANGEMENTS = [
    Strategy(data_parallel=4, expert_parallel=4, zero_dense=1),
    Strategy(pipeline_parallel=2, data_parallel=2, expert_data_parallel=2, zero_dense=1, zero_expert=1),
    Strategy(),
    Strategy(data_parallel=3, expert_data_parallel=3, zero_expert=1),
    Strategy(data_parallel=4, expert_parallel=2, expert_data_parallel=2, zero_dense=1, zero_expert=1),
    Strategy(data_parallel=4, expert_parallel=4, zero_dense=1),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("saved", "resumed"), list(pairwise(ARRANGEMENTS)), ids=lambda s: s.compact())
def test_another_arrangement_resumes_bit_for_bit(tmp_path, saved, resumed):
    run_ranks(save_rank, saved.world_size, tiny_plan(saved), tmp_path, 7)
    assert run_ranks(load_rank, resumed.world_size, tiny_plan(resumed), find_newest(tmp_path)) == (
        [7] * resumed.world_size
    )


@pytest.fixture
def saved(tmp_path) -> Path:
    for step in (2, 4, 6, 8):
        run_ranks(save_rank, 1, tiny_plan(Strategy()), tmp_path, step)
    return find_newest(tmp_path)


@pytest.mark.distributed
def test_the_newest_three_stay_and_every_tensor_is_stored_once(saved):
    assert sorted(path.name for path in saved.parent.iterdir()) == ["step-000004", "step-000006", "step-000008"]
    elements = 3 * sum(values(name, "weight").numel() for name in SHAPES)
    overhead = 18 * 2048  # each of the 18 tensors is a file of its own inside
    assert 4 * elements < sum(path.stat().st_size for path in saved.glob("*.distcp")) < 4 * elements + overhead


@pytest.mark.distributed
def test_damage_is_one_error_that_names_the_file(saved):
    plan = tiny_plan(Strategy())
    (data,) = saved.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=rf"{data.name}: is .* bytes instead of .* damaged"):
        check_resumable(saved, plan)
    data.unlink()
    with pytest.raises(UserError, match=rf"{data.name}: is missing"):
        check_resumable(saved, plan)
    data.write_bytes(bytes(len(whole)))
    with pytest.raises(AssertionError, match=r"UserError.*cannot be read"):
        run_ranks(load_rank, 1, plan, saved)
    (saved / "checkpoint.json").write_text('{"step": 7')
    with pytest.raises(UserError, match=r"checkpoint\.json: is not valid JSON"):
        check_resumable(saved, plan)


@pytest.mark.distributed
def test_a_checkpoint_of_another_model_or_batch_is_refused_by_key(saved):
    plan = tiny_plan(Strategy())
    larger = plan.model_copy(update={"model": plan.model.model_copy(update={"hidden_size": 64})})
    with pytest.raises(UserError, match=r"model\.hidden_size = 32: the plan has 64"):
        check_resumable(saved, larger)
    with pytest.raises(UserError, match=r"train\.global_batch_size = 8: the plan has 16"):
        check_resumable(saved, tiny_plan(Strategy(), global_batch_size=16))
    assert check_resumable(saved, tiny_plan(Strategy(), steps=500)).step == 8


class Harmful:
    def __reduce__(self):
        return print, ("a foreign checkpoint ran code",)


def test_a_table_of_contents_cannot_run_code(tmp_path, capsys):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match=r"\.metadata.*builtins\.print does not belong there"):
        MetadataReader(tmp_path).read_metadata()
    assert capsys.readouterr().out == ""


def test_no_checkpoint_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="train without --resume"):
        find_newest(tmp_path)


@pytest.mark.distributed
def test_the_record_lists_the_step_and_every_file(saved):
    record = json.loads((saved / "checkpoint.json").read_text())
    assert record["step"] == 8
    assert set(record["files"]) == {path.name for path in saved.iterdir()} - {"checkpoint.json"}

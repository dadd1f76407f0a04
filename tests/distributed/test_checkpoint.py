"""Checkpoints: what one arrangement saves, every other one loads, bit for bit; damage is one clear error."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.distributed.harness import run_ranks
from tests.distributed.odd_shapes import EXPERTS, SHAPES
from tests.plans import tiny_plan
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.nn import Parameter

from pipermoe.modules.names import is_expert
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.runtime.optimizer.sharding import flatten
from pipermoe.schedule.traits import schedule_traits
from pipermoe.specs.errors import MachineError, UserError
from pipermoe.specs.plan import Plan
from pipermoe.specs.strategy import Strategy
from pipermoe.training.checkpoint.store import check_resumable, check_same_text, checkpoints, load_checkpoint
from pipermoe.training.checkpoint.writer import CheckpointWriter


def values(name: str, kind: str) -> torch.Tensor:
    """A global tensor, or one expert of it, whose elements tell where they belong."""
    if (last := name.rpartition(".")[2]).isdecimal():
        return values(name.removesuffix(f".{last}"), kind)[int(last)]
    start = 1000 * (list(SHAPES).index(name) + 10 * ("weights", "exp_avg", "exp_avg_sq").index(kind))
    count = int(torch.tensor(SHAPES[name]).prod())
    return torch.arange(start, start + count, dtype=torch.float32).view(SHAPES[name])


def state(groups: ProcessGroups, plan: Plan, *, filled: bool):
    """The optimizer of this rank, with the values above or with zeros, and what its tensors should be."""
    strategy, here = plan.strategy, groups.coordinates
    experts = slice(*(EXPERTS // strategy.expert_parallel * n for n in (here.ep, here.ep + 1)))

    def local(name: str, kind: str) -> torch.Tensor:
        return values(name, kind)[experts] if is_expert(name) else values(name, kind)

    stages = schedule_traits(strategy.schedule, strategy.pipeline_parallel, 1).stages_of[here.pp]
    held = [name for name in SHAPES if int(name.split(".")[1]) // (2 // strategy.pipeline_parallel) in stages]
    weights = {name: Parameter(local(name, "weights") * filled) for name in held}
    optimizer = Optimizer(flatten(weights.items(), groups, strategy), plan.train.optimizer)
    if filled:
        for part in optimizer.updated_parts():
            part.values.copy_(values(part.span.name, part.kind).flatten()[part.span.start : part.span.stop])
    return weights, optimizer, local


def save_rank(rank: int, plan: Plan, output: Path, *steps: int) -> None:
    groups = ProcessGroups.create(plan.strategy)
    _, optimizer, _ = state(groups, plan, filled=True)
    writer = CheckpointWriter(output, plan, "text", groups)
    for step in steps:
        writer.save(step, optimizer, [("layers.0.router.correction_bias", torch.ones(EXPERTS))])
    writer.finish()


def load_rank(rank: int, plan: Plan, folder: Path) -> int:
    groups = ProcessGroups.create(plan.strategy)
    weights, optimizer, local = state(groups, plan, filled=False)
    bias = torch.zeros(EXPERTS)
    step = load_checkpoint(folder, plan, optimizer, [("layers.0.router.correction_bias", bias)])
    assert bias.eq(1).all()
    for name, weight in weights.items():
        assert plan.strategy.zero_dense == 3 or torch.equal(weight, local(name, "weights")), name
    for part in optimizer.updated_parts():
        expected = values(part.span.name, part.kind).flatten()[part.span.start : part.span.stop]
        assert torch.equal(part.values, expected), part
    return step


ARRANGEMENTS = [
    Strategy(data_parallel=4, expert_parallel=4, zero_dense=1),
    Strategy(pipeline_parallel=2, data_parallel=2, expert_data_parallel=2, zero_dense=1, zero_expert=1),
    Strategy(),
    Strategy(pipeline_parallel=2, data_parallel=2, expert_parallel=2, schedule="dualpipe", zero_dense=1, zero_expert=2),
    Strategy(data_parallel=3, expert_data_parallel=3, zero_expert=1),
    Strategy(data_parallel=4, expert_parallel=2, expert_data_parallel=2, zero_dense=3, zero_expert=3),
    Strategy(data_parallel=4, expert_parallel=4, zero_dense=2),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("saved", "resumed"), list(pairwise(ARRANGEMENTS)), ids=lambda s: s.compact())
def test_another_arrangement_resumes_bit_for_bit(tmp_path, saved, resumed):
    run_ranks(save_rank, saved.world_size, tiny_plan(saved), tmp_path, 7)
    assert run_ranks(load_rank, resumed.world_size, tiny_plan(resumed), checkpoints(tmp_path)[-1]) == (
        [7] * resumed.world_size
    )


@pytest.fixture
def saved(tmp_path) -> Path:
    run_ranks(save_rank, 1, tiny_plan(Strategy()), tmp_path, 2, 4, 6, 8)
    return checkpoints(tmp_path)[-1]


@pytest.mark.distributed
def test_the_newest_three_stay_and_every_tensor_is_stored_once(saved):
    assert sorted(path.name for path in saved.parent.iterdir()) == ["step-000004", "step-000006", "step-000008"]
    elements = 3 * sum(values(name, "weights").numel() for name in SHAPES)
    header = 36 * 256  # of 36 vectors: 4 experts have their own
    assert 4 * elements < sum(path.stat().st_size for path in saved.glob("*.safetensors")) < 4 * elements + header


@pytest.mark.distributed
def test_damage_is_one_error_that_names_the_file(saved):
    plan = tiny_plan(Strategy())
    (data,) = saved.glob("*.safetensors")
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


def fail_to_write(rank: int, plan: Plan, output: Path) -> str:
    groups = ProcessGroups.create(plan.strategy)
    _, optimizer, _ = state(groups, plan, filled=True)
    writer = CheckpointWriter(output, plan, "text", groups)
    if rank == 1:
        (output / "checkpoints").write_text("in the way of a folder")
    dist.barrier()
    writer.save(1, optimizer, [])
    with pytest.raises(MachineError) as caught:
        writer.save(2, optimizer, [])
    return str(caught.value)


@pytest.mark.distributed
def test_what_fails_in_the_background_is_raised_by_the_next_save_on_every_rank(tmp_path):
    plan = tiny_plan(Strategy(data_parallel=2, expert_data_parallel=2))
    messages = run_ranks(fail_to_write, 2, plan, tmp_path)
    assert messages[0] == messages[1]
    assert messages[0].startswith("rank 0: checkpoint of step 1: ")
    assert not list(tmp_path.glob("checkpoints/step-*"))


def continue_while_saving(rank: int, plan: Plan, output: Path) -> None:
    groups = ProcessGroups.create(plan.strategy)
    _, optimizer, _ = state(groups, plan, filled=True)
    writer = CheckpointWriter(output, plan, "text", groups)
    writer.save(7, optimizer, [("layers.0.router.correction_bias", torch.ones(EXPERTS))])
    for part in optimizer.updated_parts():
        part.values.fill_(-1.0)  # the next step
    writer.finish()


@pytest.mark.distributed
def test_a_checkpoint_holds_the_state_when_it_was_saved_not_when_it_is_written(tmp_path):
    run_ranks(continue_while_saving, 1, tiny_plan(Strategy()), tmp_path)
    assert run_ranks(load_rank, 1, tiny_plan(Strategy()), checkpoints(tmp_path)[-1]) == [7]


@pytest.mark.distributed
def test_dcp_itself_opens_a_checkpoint(saved):
    name = "weights.layers.1.experts.up.weight.2"
    vector = torch.zeros(values(name.removeprefix("weights."), "weights").numel())
    load({name: vector}, storage_reader=HuggingFaceStorageReader(str(saved)), no_dist=True)
    assert torch.equal(vector, values(name.removeprefix("weights."), "weights").flatten())


@pytest.mark.distributed
def test_no_file_of_a_checkpoint_can_run_code(saved):
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}


@pytest.mark.distributed
def test_a_checkpoint_of_a_run_that_read_another_text_is_refused(saved):
    check_same_text(saved, "text", "corpus")
    with pytest.raises(UserError, match="has read another text than corpus holds now"):
        check_same_text(saved, "changed text", "corpus")


@pytest.mark.distributed
def test_the_record_lists_the_step_and_every_file(saved):
    record = json.loads((saved / "checkpoint.json").read_text())
    assert record["step"] == 8
    assert set(record["files"]) == {path.name for path in saved.iterdir()} - {"checkpoint.json"}

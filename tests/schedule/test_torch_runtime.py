"""torch.distributed.pipelining executes our CSV: the same gradients as one process, schedule by schedule."""

from typing import Literal

import pytest
import torch
import torch.distributed as dist
from tests.distributed.harness import run_ranks
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime, get_schedule_class

from pipermoe.schedule.builders import RECIPES, build
from pipermoe.schedule.checker import check
from pipermoe.schedule.communication import with_communication
from pipermoe.schedule.sharding import with_gathered_weights, with_reduction
from pipermoe.schedule.torch_csv import read_csv, write_csv

# ours: torch's. InterleavedZeroBubble with one stage per rank is ZB-H1.
IN_TORCH = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "breadth-first": "LoopedBFS",
    "interleaved-1f1b": "Interleaved1F1B",
    "zb-h1": "InterleavedZeroBubble",
    "zb-v": "ZBVZeroBubble",
    "dualpipe-v": "DualPipeV",
}
MICROBATCHES, ROWS, WIDTH = 8, 2, 4
RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]


def block(stage: int) -> nn.Module:
    torch.manual_seed(stage)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def loss_of(output, target):
    return ((output - target) ** 2).mean()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(99)
    return torch.randn(MICROBATCHES * ROWS, WIDTH), torch.randn(MICROBATCHES * ROWS, WIDTH)


def step(rank: int, schedule, path, form: Literal["compute_only", "compute_comms"]) -> float:
    """Run one step of `schedule` on torch's runtime from its CSV; the largest gradient error of this rank's stages."""
    blocks = {stage: block(stage) for stage in schedule.stages_of(rank)}
    stages = [PipelineStage(b, stage, schedule.num_stages, torch.device("cpu")) for stage, b in blocks.items()]
    runtime = _PipelineScheduleRuntime(stages, schedule.microbatches, loss_fn=loss_of)
    runtime._load_csv(str(path), format=form)
    inputs, targets = data()
    last = schedule.num_stages - 1 in blocks
    runtime.step(*([inputs] if 0 in blocks else []), **({"target": targets, "losses": []} if last else {}))
    whole = nn.Sequential(*map(block, range(schedule.num_stages)))
    for x, y in zip(inputs.chunk(MICROBATCHES), targets.chunk(MICROBATCHES), strict=True):
        (loss_of(whole(x), y) / MICROBATCHES).backward()
    return max(
        float((gradient(mine) - gradient(theirs)).abs().max())
        for stage, b in blocks.items()
        for mine, theirs in zip(b.parameters(), whole[stage].parameters(), strict=True)
    )


def gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def run_all(rank: int, ranks: int, folder) -> dict[tuple[str, str], float]:
    """Torch lowers compute_only itself; compute_comms is our lowering, gradient reduction (here: scaling) included."""
    errors = {}
    for name in IN_TORCH:
        schedule = build(name, ranks, MICROBATCHES, RECIPES[name].virtual_stages[0])
        for form in ("compute_only", "compute_comms"):
            path = folder / f"{name}-{form}-{rank}.csv"
            lowered = with_communication(with_gathered_weights(with_reduction(schedule)))
            write_csv(lowered if form == "compute_comms" else schedule, path)
            errors[name, form] = step(rank, schedule, path, form)
    return errors


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", RANKS)
def test_torch_runs_our_csv_with_the_gradients_of_one_process(tmp_path, ranks):
    for errors in run_ranks(run_all, ranks, ranks, tmp_path):
        assert set(errors) == {(name, form) for name in IN_TORCH for form in ("compute_only", "compute_comms")}
        assert max(errors.values()) < 1e-6, errors


def dump_all(rank: int, ranks: int, folder) -> None:
    """Torch's own schedules that write CSV, each into <folder>/<torch's name>.csv."""
    for name, theirs in IN_TORCH.items():
        if name in ("gpipe", "1f1b"):
            continue  # torch runs these two from code, without a list of actions
        mine = build(name, ranks, MICROBATCHES, RECIPES[name].virtual_stages[0])
        stages = [
            PipelineStage(block(stage), stage, mine.num_stages, torch.device("cpu")) for stage in mine.stages_of(rank)
        ]
        schedule = get_schedule_class(theirs)(stages, MICROBATCHES, loss_fn=loss_of)
        if rank == 0:
            for form in ("compute_only", "compute_comms"):
                schedule._dump_csv(str(folder / f"{theirs}-{form}.csv"), format=form)
    dist.barrier()


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", RANKS)
def test_we_read_and_accept_what_torch_writes(tmp_path, ranks):
    run_ranks(dump_all, ranks, ranks, tmp_path)
    for name, theirs in IN_TORCH.items():
        if name in ("gpipe", "1f1b"):
            continue
        mine = build(name, ranks, MICROBATCHES, RECIPES[name].virtual_stages[0])
        read = read_csv(tmp_path / f"{theirs}-compute_only.csv")
        assert read.stage_rank == mine.stage_rank
        assert check(with_communication(read)) == []
        if name in ("interleaved-1f1b", "dualpipe-v", "zb-v"):
            assert read.ranks == mine.ranks, f"{name}:\n{read}\n\n{mine}"

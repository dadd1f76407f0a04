"""Local ranks finish together or stop together, and one line names the rank that is to blame."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipermoe.processes.local_ranks import run_local_ranks
from pipermoe.processes.world import World
from pipermoe.specs.errors import MachineError, UserError

pytestmark = pytest.mark.distributed
SHORT, LONG = 3.0, 90.0  # seconds, for ranks that fall silent; for those that shall not be taken to have


def join(world: World, timeout: float = LONG) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=world.init_method,
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout),
    )
    (Path(world.init_method.removeprefix("file://")).parent / f"{world.rank}.pid").write_text(str(os.getpid()))
    dist.barrier()


def step_forever() -> None:
    while True:
        dist.all_reduce(torch.ones(4))


def raises(world: World) -> None:
    join(world)
    if world.rank == 1:
        raise ValueError("a bug on this rank")
    step_forever()


def dies(world: World) -> None:
    join(world)
    if world.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    step_forever()


def stalls(world: World) -> None:
    join(world, SHORT)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    step_forever()


def is_misused(world: World) -> None:
    join(world)
    if world.rank == 0:
        raise UserError("data.paths: nothing there")
    step_forever()


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        (raises, MachineError, r"^rank 1: ValueError: a bug on this rank \(traceback in .*rank-1\.error\.txt\)$"),
        (dies, MachineError, r"^rank 2 was killed by SIGKILL"),
        (stalls, MachineError, r"^rank 1 stalled: no answer within 3 s"),
        (is_misused, UserError, r"^data\.paths: nothing there$"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_rank_that_fails_is_named_and_nothing_survives_it(tmp_path, target, kind, message):
    with pytest.raises(kind, match=message) as caught:
        run_local_ranks(3, target, tmp_path, SHORT if target is stalls else LONG)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def writes(world: World) -> None:
    join(world)
    assert world.starter == "pipermoe"
    ranks = [torch.zeros(1) for _ in range(world.size)]
    dist.all_gather(ranks, torch.tensor([float(world.rank)]))
    Path(os.environ["WHERE"], f"{world.rank}").write_text(str([int(rank) for rank in ranks]))
    dist.barrier()


def test_ranks_that_succeed_return_to_the_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", str(tmp_path))
    run_local_ranks(3, writes, tmp_path, LONG)
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["[0, 1, 2]"] * 3


def report_and_step(world: World) -> None:
    join(world)
    os.write(1, b"joined\n")
    step_forever()


def parent(folder: Path, say: int) -> None:
    """A process that starts ranks and says when it is interrupted."""
    os.dup2(say, 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background ignores
    try:
        run_local_ranks(2, report_and_step, folder, LONG)
    except KeyboardInterrupt:
        os.write(1, b"interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_no_rank_outlives_an_interrupted_or_killed_parent(tmp_path, number):
    reader, writer = os.pipe()
    process = get_context("fork").Process(target=parent, args=(tmp_path, writer))
    process.start()
    os.close(writer)
    with open(reader, "rb") as said:
        assert [said.readline() for _ in range(2)] == [b"joined\n"] * 2
        assert process.pid is not None
        os.kill(process.pid, number)
        rest = said.read()  # ends when the last process that could write has ended
    process.join()
    assert rest == (b"interrupted\n" if number == signal.SIGINT else b"")

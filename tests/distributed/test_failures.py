"""What happens to a run when something breaks in its middle: it ends, soon, with one line that says what and where."""

from __future__ import annotations

import os
import re
import signal
import sys
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from threading import Event

import pytest
from tests.plans import TINY_MODEL, tiny_plan
from tests.ports import free_ports

from pipermoe.cli import main
from pipermoe.processes.blame import WAITING
from pipermoe.processes.output_folder import lock_folder
from pipermoe.processes.status_board import StatusBoard
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.specs.documents import save
from pipermoe.specs.errors import MachineError, UserError
from pipermoe.specs.strategy import Strategy
from pipermoe.training.launch import launch
from pipermoe.training.roll_call import RollCall
from pipermoe.training.run import Run

pytestmark = pytest.mark.distributed
PIPELINE = Strategy(pipeline_parallel=2)
SHORT, LONG = 10, 90  # seconds, for ranks that fall silent; for those that shall not be taken to have
WRITING = "saving the checkpoint of step 4"  # while that of step 2 is still being written


@pytest.fixture
def plan(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the square of {n} is {n * n}.\n" for n in range(2000)))
    return tiny_plan(PIPELINE, data={"paths": (str(text),)}, checkpoint_every=2)


def at(moment: str, rank: int, act, monkeypatch) -> None:
    """Let `act` happen on `rank` when it says that it is about to do what begins with `moment`."""
    writer = StatusBoard.writer

    def watched(self, process):
        write = writer(self, process)

        def tell(text: str) -> None:
            write(text)
            if process == rank and text.startswith(moment):
                act()

        return tell

    monkeypatch.setattr(StatusBoard, "writer", watched)


def fail() -> None:
    raise ValueError("a bug on this rank")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            fail,
            r"^step 2: rank 1: action 1F1 \(stage 1, micro-batch 1\) failed: ValueError: a bug on this rank "
            r"\(traceback in .*rank-1\.error\.txt\)$",
        ),
        (
            die,
            r"^rank 1 \(step 2, action 1F1 \(stage 1, micro-batch 1\)\) was killed by SIGKILL without a word",
        ),
        (
            stop,
            r"^rank 1 \(step 2, action 1F1 \(stage 1, micro-batch 1\)\) stalled: no answer within 10 s \(step 2: ",
        ),
    ],
    ids=["raises", "dies", "stalls"],
)
def test_the_failing_rank_its_action_and_micro_batch_are_named(plan, tmp_path, monkeypatch, act, message):
    at("step 2, action 1F1", 1, act, monkeypatch)
    timeout = timedelta(seconds=SHORT if act is stop else LONG)
    with pytest.raises(MachineError, match=message) as caught:
        launch(plan, Run(tmp_path / "run", quiet=True, timeout=timeout))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "measurement.json").exists()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(plan, tmp_path, monkeypatch):
    output = tmp_path / "run"

    def block() -> None:  # root may write everywhere, so a file lies where the folder is to be
        if (output / "checkpoints" / "step-000002").exists():
            (output / "checkpoints" / ".partial").write_text("in the way")

    at("step 4, update", 0, block, monkeypatch)
    with pytest.raises(UserError, match="checkpoint"):
        launch(plan, Run(output, quiet=True, timeout=timedelta(seconds=LONG)))
    assert [path.name for path in (output / "checkpoints").glob("step-*")] == ["step-000002"]


def interrupted_at(moment: str, arguments: list[str], say: int) -> None:
    """The command as a process of its own whose rank 0 stops and tells when it comes to `moment`."""
    os.dup2(say, 1)
    sys.stderr = os.fdopen(1, "w", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background ignores

    def stop() -> None:
        os.write(1, b"there\n")
        signal.pause()

    def begin_to_write(partial: Path, pieces: object, rank: int) -> None:
        partial.mkdir(parents=True, exist_ok=True)
        (partial / f"{rank}.safetensors").write_text("half of a file")
        Event().wait()

    with pytest.MonkeyPatch.context() as patch:
        at(moment, 0, stop, patch)
        if moment == WRITING:
            patch.setattr("pipermoe.training.checkpoint.writer.write_pieces", begin_to_write)
        main(arguments)


@pytest.mark.parametrize("moment", ["meeting", "building", "validating", "step 1, action 0F0", "saving", WRITING])
def test_an_interrupt_ends_every_process_whatever_they_are_doing(plan, tmp_path, moment):
    save(tmp_path / "plan.toml", plan)
    reader, writer = os.pipe()
    arguments = ["train", "--plan", str(tmp_path / "plan.toml"), "-o", str(tmp_path / "run"), "--json"]
    command = get_context("fork").Process(target=interrupted_at, args=(moment, arguments, writer))
    command.start()
    os.close(writer)
    with open(reader, "rb") as said:
        assert any(line == b"there\n" for line in iter(said.readline, b""))
        assert command.pid is not None
        os.kill(command.pid, signal.SIGINT)
        assert said.read().splitlines()[-1] == b"pipermoe: interrupted"  # ends when the last that could write has
    command.join()
    assert command.exitcode == 130
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_folder_that_another_run_is_writing_to_is_refused(plan, tmp_path):
    with lock_folder(tmp_path / "run"), pytest.raises(UserError, match=r"run: another pipermoe is writing there"):
        launch(plan, Run(tmp_path / "run"))


def rank_of_others(environment: dict[str, str], arguments: list[str], say: int, act) -> None:
    """A process that somebody else has started as a rank; `act` replaces parts of the program."""
    os.dup2(say, 1)
    sys.stderr = os.fdopen(1, "w", closefd=False)
    os.environ |= environment | {"GLOO_SOCKET_IFNAME": "lo"}
    with pytest.MonkeyPatch.context() as patch:
        act(patch)
        main(arguments)


def by_torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **address}


def by_srun(rank: int, size: int, port: int) -> dict[str, str]:
    address = {"SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": str(size), **address}


def started(plan, folder: Path, environment, acts, timeout: float = LONG) -> tuple[list, list[int]]:
    """The processes of all ranks, and where each one's output can be read."""
    save(folder / "plan.toml", plan)
    [port], size = free_ports(1), plan.strategy.world_size
    arguments = ["train", "--plan", str(folder / "plan.toml"), "-o", str(folder / "run"), "--json"]
    arguments += ["--timeout", str(timeout)]
    ranks, readers = [], []
    for rank in range(size):
        reader, writer = os.pipe()
        act = acts.get(rank, lambda patch: None)
        ranks.append(
            get_context("fork").Process(
                target=rank_of_others, args=(environment(rank, size, port), arguments, writer, act)
            )
        )
        ranks[-1].start()
        os.close(writer)
        readers.append(reader)
    return ranks, readers


def said(reader: int) -> list[str]:
    """All that a rank said, once it has ended."""
    with open(reader) as lines:
        return lines.read().splitlines()


@pytest.mark.parametrize("stops", [False, True], ids=["undisturbed", "interrupted"])
def test_ranks_that_torchrun_started_train_together_and_end_together(plan, tmp_path, stops):
    def interrupt(patch) -> None:
        patch.setattr(Engine, "step", lambda self, batch: (os.kill(os.getpid(), signal.SIGINT), Event().wait()))

    ranks, readers = started(plan, tmp_path, by_torchrun, {1: interrupt} if stops else {})
    for reader in readers:
        said(reader)
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == ([4, 130] if stops else [0, 0])
    assert (tmp_path / "run" / "measurement.json").exists() != stops


def when_it_tells(moment: str, act):
    """Lets `act` happen when a rank tells that it is about to do what begins with `moment`."""

    def replace(patch) -> None:
        tell = RollCall.tell

        def watched(self, doing: str) -> None:
            tell(self, doing)
            if doing.startswith(moment) and not doing.endswith(WAITING):
                self._sign()  # which else comes twice a second
                act()

        patch.setattr(RollCall, "tell", watched)

    return replace


def wait_forever() -> None:
    Event().wait()


SLOW = pytest.mark.slow  # each waits until the timeout is over, and for signs of life
PLACE = r"step 2, action 1F1 \(stage 1, micro-batch 1\)"
ENDED = "ended without a word: killed, or the machine is out of memory$"
SILENT = "has given no sign of life for 3 s: stopped, or its machine is gone$"
HOST = "rank 0, which keeps the store that the ranks have met in, (is gone|does not answer): killed or stopped"


@pytest.mark.parametrize(
    ("environment", "rank", "act", "message"),
    [
        (by_torchrun, 1, fail, r"step 2: rank 1: action 1F1 \(.*\) failed: ValueError: a bug on this rank \(trace"),
        pytest.param(by_srun, 0, fail, r"step 2: rank 0: action 0F1 \(.*\) failed: ValueError: ", marks=SLOW),
        pytest.param(by_srun, 1, die, rf"rank 1 \({PLACE}\) {ENDED}", marks=SLOW),
        pytest.param(by_srun, 0, die, HOST, marks=SLOW),
        pytest.param(by_torchrun, 1, stop, rf"rank 1 \({PLACE}\) {SILENT}", marks=SLOW),
        pytest.param(by_srun, 0, stop, HOST, marks=SLOW),
        pytest.param(by_srun, 1, wait_forever, rf"rank 1 \({PLACE}\) stalled: no answer within 10 s", marks=SLOW),
    ],
    ids=["raises", "the first raises", "killed", "the first is killed", "stopped", "the first is stopped", "stalls"],
)
def test_all_ranks_that_others_started_end_with_one_line_about_the_one_that_failed(
    plan, tmp_path, environment, rank, act, message
):
    plan = tiny_plan(Strategy(pipeline_parallel=3), data=plan.train.data)
    plan = plan.model_copy(update={"model": TINY_MODEL.model_copy(update={"num_layers": 3})})
    silent, act = act in (stop, wait_forever), when_it_tells(f"step 2, action {rank}F1", act)
    timeout = SHORT if silent else LONG
    ranks, readers = started(plan, tmp_path, environment, {rank: act}, timeout)
    lines = {other: said(readers[other])[-1].split("; last heard of")[0] for other in range(3) if other != rank}
    for other in lines:
        ranks[other].join()
        assert ranks[other].exitcode == 4
    ranks[rank].kill()
    ranks[rank].join()
    assert len(set(lines.values())) == 1
    for line in lines.values():
        assert re.match(f"pipermoe: {message}", line), line
    assert not (tmp_path / "run" / "measurement.json").exists()

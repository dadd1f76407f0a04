"""Where the demo's job is measured and trained: this machine, or two hosts with a slow link between them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import IO, Protocol

from benchmarks.demo_trials import Trials, read_results, try_all
from benchmarks.network import bed as network
from pipermoe.measure import measure_platform
from pipermoe.processes.local_ranks import run_local_ranks
from pipermoe.specs.documents import load
from pipermoe.specs.errors import MachineError
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.train import TrainConfig

MODEL = "tiny-moe"
RANKS = 4
HOSTS = 2  # of the slow link
MASTER_PORT = 29400
ENTER = Path(network.__file__).parent / "enter"
RESULTS = "results.jsonl"


@contextmanager
def _told() -> Iterator[None]:
    """What ends trials early, an interrupt or a rank that fails, is told; what was tried before counts."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    except (MachineError, SystemExit) as error:
        print(error, file=sys.stderr)


class Machine(Protocol):
    """Ranks that measure and train."""

    def measure(self, model: ModelSpec) -> Platform: ...

    def tried(self, trials: Trials) -> list[list[float]]:
        """The seconds of every timed step, of as many strategies as were tried before the time was over."""
        ...


class ThisMachine:
    """All ranks share it."""

    def measure(self, model: ModelSpec) -> Platform:
        platform = measure_platform(nproc=RANKS, model=model)
        assert platform is not None, "this process starts the ranks, so it has the result"
        return platform

    def tried(self, trials: Trials) -> list[list[float]]:
        with tempfile.TemporaryDirectory(prefix="pipermoe-demo-") as folder:
            results = Path(folder) / RESULTS
            with _told():
                run_local_ranks(RANKS, lambda world: try_all(trials, world, results), Path(folder))
            return read_results(results)


class TwoHosts:
    """Namespaces with half of the ranks each, whose one link is shaped: what torchrun would start on two machines."""

    def measure(self, model: ModelSpec) -> Platform:
        with tempfile.TemporaryDirectory(prefix="pipermoe-demo-") as folder:
            written = Path(folder) / "machine.toml"
            self._start("pipermoe", "measure", "--model", model.name, "-o", str(written))
            return load(written, Platform)

    def tried(self, trials: Trials) -> list[list[float]]:
        with tempfile.TemporaryDirectory(prefix="pipermoe-demo-") as folder:
            asked, results = Path(folder) / "trials.json", Path(folder) / RESULTS
            asked.write_text(trials.model_dump_json())
            with _told():
                self._start("benchmarks.demo_trials", str(asked), str(results))
            return read_results(results)

    def _start(self, *command: str) -> None:
        """Run a module as every rank, until all have ended; the output of a rank that fails goes to stderr."""
        with ExitStack() as started:
            outputs = [started.enter_context(tempfile.TemporaryFile("w+")) for _ in range(RANKS)]
            ranks = [started.enter_context(self._rank(rank, command, outputs[rank])) for rank in range(RANKS)]
            try:
                codes = [rank.wait() for rank in ranks]
            finally:
                for rank in ranks:
                    rank.kill()
            for number, (code, output) in enumerate(zip(codes, outputs, strict=True)):
                if code:
                    output.seek(0)
                    sys.exit(f"rank {number} of {command[0]} ended with {code}:\n{output.read()}")

    def _rank(self, rank: int, command: tuple[str, ...], output: IO[str]) -> subprocess.Popen[bytes]:
        per_host = RANKS // HOSTS
        world = {
            "RANK": rank,
            "WORLD_SIZE": RANKS,
            "LOCAL_RANK": rank % per_host,
            "MASTER_ADDR": network.address(0, 0),
            "MASTER_PORT": MASTER_PORT,
            "GLOO_SOCKET_IFNAME": "nic0",
        }
        inside = [str(ENTER), network.name_of(rank // per_host), sys.executable, "-m", *command]
        env = os.environ | {key: str(value) for key, value in world.items()}
        return subprocess.Popen(inside, env=env, stdout=output, stderr=subprocess.STDOUT)


@contextmanager
def slow_link(megabits: float) -> Iterator[TwoHosts]:
    """Two hosts whose one link carries `megabits` (Mbit/s) each way. Needs root, iproute2 and a C compiler."""
    network.up(network.Bed(hosts=HOSTS, groups=1, uplink=megabits, global_=megabits))
    try:
        yield TwoHosts()
    finally:
        network.down()


def demo_job() -> TrainConfig:
    """What the demo trains its model on."""
    job = files("pipermoe.catalogue").joinpath("jobs/demo.toml")
    return load(str(job), TrainConfig).model_copy(update={"validation_batches": 1})


def demo_options(parser: ArgumentParser, *, steps: int, passes: int) -> None:
    """The options of every benchmark that trains the demo's job."""
    parser.add_argument("--platform", type=Path)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--passes", type=int, default=passes)

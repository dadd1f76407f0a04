"""Where the demo's job is measured and trained: this machine, or two hosts with a slow link between them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import IO, Protocol

from benchmarks.network import bed as network
from pipermoe.measure import measure_platform
from pipermoe.resources.step import predict
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.documents import load, save
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.plan import Measurement, Plan
from pipermoe.specs.platform import Platform
from pipermoe.specs.report import StepReport
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig
from pipermoe.specs.units import GIB
from pipermoe.training.launch import launch
from pipermoe.training.run import Run
from pipermoe.training.trainer import MEASUREMENT_FILE

MODEL = "tiny-moe"
RANKS = 4
HOSTS = 2  # of the slow link
MASTER_PORT = 29400
ENTER = Path(network.__file__).parent / "enter"


class Machine(Protocol):
    """Ranks that measure and train."""

    def measure(self, model: ModelSpec) -> Platform: ...

    def train(self, plans: list[Plan], steps: int) -> list[StepReport]:
        """What `steps` steps of every plan measured, one plan after the other; interrupted, of those before."""
        ...


class ThisMachine:
    """All ranks share it."""

    def measure(self, model: ModelSpec) -> Platform:
        platform = measure_platform(nproc=RANKS, model=model)
        assert platform is not None, "this process starts the ranks, so it has the result"
        return platform

    def train(self, plans: list[Plan], steps: int) -> list[StepReport]:
        reports = []
        with suppress(KeyboardInterrupt):
            for plan in plans:
                with tempfile.TemporaryDirectory(prefix="pipermoe-demo-") as folder:
                    measurement = launch(plan, Run(Path(folder), steps=steps, quiet=True))
                assert measurement is not None, "this process starts the ranks, so it has the result"
                reports.append(measurement.report)
        return reports


class TwoHosts:
    """Namespaces with half of the ranks each, whose one link is shaped: what torchrun would start on two machines."""

    def measure(self, model: ModelSpec) -> Platform:
        with tempfile.TemporaryDirectory(prefix="pipermoe-demo-") as folder:
            written = Path(folder) / "machine.toml"
            self._start("pipermoe", "measure", "--model", model.name, "-o", str(written))
            return load(written, Platform)

    def train(self, plans: list[Plan], steps: int) -> list[StepReport]:
        """The same ranks train all of them: a process spends more time on importing torch than on a few steps."""
        with tempfile.TemporaryDirectory(prefix="pipermoe-demo-") as folder:
            for number, plan in enumerate(plans):
                save(Path(folder) / f"{number}.toml", plan)
            with suppress(KeyboardInterrupt):
                self._start("benchmarks.demo_rank", folder, str(steps))
            files = [Path(folder) / str(number) / MEASUREMENT_FILE for number in range(len(plans))]
            return [load(file, Measurement).report for file in files if file.exists()]

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


@dataclass(frozen=True)
class Demo:
    """The demo's job on a machine."""

    machine: Machine
    model: ModelSpec
    train: TrainConfig
    platform: Platform

    @classmethod
    def on(cls, machine: Machine, platform: Path | None) -> Demo:
        """On `machine`, measured now if no platform file says what it can do."""
        model, job = load_model(MODEL), files("pipermoe.catalogue").joinpath("jobs/demo.toml")
        train = load(str(job), TrainConfig).model_copy(update={"validation_batches": 1})
        return cls(machine, model, train, load(platform, Platform) if platform else machine.measure(model))

    def plan(self, strategy: str) -> Plan:
        parsed = Strategy.parse(strategy)
        return Plan(
            name=strategy,
            platform=self.platform.name,
            memory_budget_bytes=GIB,
            model=self.model,
            train=self.train,
            strategy=parsed,
            prediction=predict(self.model, self.platform, self.train, parsed),
        )

    def measured(self, plans: list[Plan], steps: int, passes: int) -> dict[str, list[StepReport]]:
        """What every plan took in every pass; every second pass goes backwards, so that drift cancels.

        Plans that were not trained, as somebody interrupted it, are left out; where that is all of them it ends.
        """
        order = [plan for number in range(passes) for plan in (plans if number % 2 == 0 else reversed(plans))]
        reports: dict[str, list[StepReport]] = {}
        for plan, report in zip(order, self.machine.train(order, steps), strict=False):
            reports.setdefault(plan.name, []).append(report)
        if not reports:
            sys.exit("interrupted before a strategy was trained")
        return reports


def demo_options(parser: ArgumentParser, steps: int) -> None:
    """The options of every benchmark that trains the demo's job."""
    parser.add_argument("--platform", type=Path)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--passes", type=int, default=1)

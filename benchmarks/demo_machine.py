"""Where the demo's job is measured and trained: this machine, or two hosts with a slow link between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Protocol

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

MODEL = "tiny-moe"
RANKS = 4
HOSTS = 2  # of the slow link
ENTER = Path(network.__file__).parent / "enter"


class Machine(Protocol):
    """Ranks that measure and train."""

    def measure(self, model: ModelSpec) -> Platform: ...

    def train(self, plan: Plan, steps: int) -> StepReport:
        """What `steps` steps of the plan measured."""
        ...


class ThisMachine:
    """All ranks share it."""

    def measure(self, model: ModelSpec) -> Platform:
        platform = measure_platform(nproc=RANKS, model=model)
        assert platform is not None, "this process starts the ranks, so it has the result"
        return platform

    def train(self, plan: Plan, steps: int) -> StepReport:
        with tempfile.TemporaryDirectory(prefix="pipermoe-demo-") as folder:
            measurement = launch(plan, Run(Path(folder), steps=steps, quiet=True))
        assert measurement is not None, "this process starts the ranks, so it has the result"
        return measurement.report


class TwoHosts:
    """Namespaces with half of the ranks each, whose one link is shaped: what torchrun would start on two machines."""

    def measure(self, model: ModelSpec) -> Platform:
        with tempfile.TemporaryDirectory(prefix="pipermoe-demo-") as folder:
            written = Path(folder) / "machine.toml"
            self._start("measure", "--model", model.name, "-o", str(written))
            return load(written, Platform)

    def train(self, plan: Plan, steps: int) -> StepReport:
        with tempfile.TemporaryDirectory(prefix="pipermoe-demo-") as folder:
            path, run = save(Path(folder) / "plan.toml", plan), Path(folder) / "run"
            self._start("train", "--plan", str(path), "-o", str(run), "--steps", str(steps))
            return load(run / "measurement.json", Measurement).report

    def _start(self, *command: str) -> None:
        """Run a command of pipermoe as every rank; the output of a rank that fails goes to stderr."""
        ranks = [self._rank(rank, command) for rank in range(RANKS)]
        outputs = [rank.communicate()[0] for rank in ranks]
        for number, (rank, output) in enumerate(zip(ranks, outputs, strict=True)):
            if rank.returncode:
                sys.exit(f"rank {number} of {command[0]} ended with {rank.returncode}:\n{output}")

    def _rank(self, rank: int, command: tuple[str, ...]) -> subprocess.Popen[str]:
        per_host = RANKS // HOSTS
        world = {
            "RANK": rank,
            "WORLD_SIZE": RANKS,
            "LOCAL_RANK": rank % per_host,
            "MASTER_ADDR": network.address(0, 0),
            "MASTER_PORT": 29400,
            "GLOO_SOCKET_IFNAME": "nic0",
        }
        inside = [str(ENTER), network.name_of(rank // per_host), sys.executable, "-m", "pipermoe", *command]
        return subprocess.Popen(
            inside,
            env=os.environ | {key: str(value) for key, value in world.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


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
        """What every plan took in every pass; every second pass goes backwards, so that drift cancels."""
        reports: dict[str, list[StepReport]] = {plan.name: [] for plan in plans}
        for number in range(passes):
            for plan in plans if number % 2 == 0 else reversed(plans):
                reports[plan.name].append(self.machine.train(plan, steps))
        return reports


def demo_options(parser: ArgumentParser, steps: int) -> None:
    """The options of every benchmark that trains the demo's job."""
    parser.add_argument("--platform", type=Path)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--json", type=Path)


def write_json(options: Namespace, summary: dict, rows: list[dict]) -> None:
    if options.json:
        options.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=2) + "\n")

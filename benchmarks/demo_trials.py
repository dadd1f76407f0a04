"""Short trials of many strategies by ranks that stay: what one rank does, and how it runs where others started it.

    python -m benchmarks.demo_trials TRIALS RESULTS

A process spends ten times as long on starting as on a few steps of the demo's model. So the ranks are started once, and
of every strategy build the runtime that `pipermoe train` would build, and do some steps of it: the first warms up, the
others are timed. Nothing is validated, counted or saved.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import get_args

import torch
import torch._dynamo  # as training/rank.py: once, before ranks are forked
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes
from torch import Tensor

from pipermoe.data.batches import TextData, load_text, micro_batches
from pipermoe.exchange.executor.gather_json import all_gather_json
from pipermoe.processes.world import World, existing_world
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.runtime.step import training_step
from pipermoe.schedule.builders import schedule_of
from pipermoe.schedule.communication import with_communication
from pipermoe.specs.base import Frozen
from pipermoe.specs.mesh import Axis, coordinates, group_of
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig
from pipermoe.training.run import TIMEOUT_SECONDS

TIMEOUT = timedelta(seconds=TIMEOUT_SECONDS)


class Trials(Frozen):
    """Strategies to try one after the other: `steps` timed ones each, the last begun before `until` (Unix time)."""

    model: ModelSpec
    train: TrainConfig
    strategies: tuple[Strategy, ...]
    steps: int
    until: float


def try_all(trials: Trials, world: World, results: Path) -> None:
    """As rank `world.rank`. Rank 0 appends to `results` the seconds of the steps of every strategy, a line each."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=world.init_method, rank=world.rank, world_size=world.size, timeout=TIMEOUT
    )
    assert dist.group.WORLD is not None
    rank = _Rank(trials.model, trials.train, load_text(trials.train, trials.model.vocab_size))
    gc.freeze()  # what the imports made is not looked at again
    for strategy in trials.strategies:
        in_time, *_ = all_gather_json(time.time() < trials.until, dist.group.WORLD)  # as rank 0 says
        if not in_time:
            break
        walls = map(max, zip(*all_gather_json(rank.seconds(strategy, trials.steps), dist.group.WORLD), strict=True))
        if world.rank == 0:
            with results.open("a") as file:
                file.write(json.dumps(list(walls)) + "\n")
    dist.barrier()  # who leaves early closes its connections under the others
    dist.destroy_process_group()


def read_results(results: Path) -> list[list[float]]:
    """The seconds of the timed steps of every strategy that was tried."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


@dataclass(frozen=True)
class _Rank:
    """One rank of the job. `groups` of arrangements are made once: each holds connections for as long as it lives."""

    model: ModelSpec
    train: TrainConfig
    data: TextData
    groups: dict[tuple, ProcessGroups] = field(default_factory=dict)

    def seconds(self, strategy: Strategy, steps: int) -> list[float]:
        """What each of `steps` steps took on this rank, after one that does not count."""
        gc.collect()  # the runtime of the trial before, whose parts hold each other
        schedule = with_communication(schedule_of(strategy, self.train.global_batch_size))
        groups = self._groups(strategy)
        engine = Engine(self.model, self.train, strategy, schedule, groups)
        optimizer, took = Optimizer(engine.flats, self.train.optimizer), []
        for step in range(1 + steps):
            numbers = micro_batches(
                self.data.training_numbers(step),
                strategy.data_parallel,
                groups.coordinates.dp,
                strategy.micro_batch_size,
            )
            start = time.perf_counter()
            batch = torch.from_numpy(self.data.train[numbers])
            training_step(engine, optimizer, batch, _norm, self.train.optimizer.learning_rate)
            took.append(time.perf_counter() - start)
        return took[1:]

    def _groups(self, strategy: Strategy) -> ProcessGroups:
        ranks, axes = range(strategy.world_size), get_args(Axis)
        arrangement = tuple((coordinates(strategy, r), *(group_of(strategy, axis, r) for axis in axes)) for r in ranks)
        if arrangement not in self.groups:
            self.groups[arrangement] = ProcessGroups.create(strategy, TIMEOUT)
        return self.groups[arrangement]


def _norm(totals: Tensor) -> float:
    return math.sqrt(totals[0].item())


def main(trials: str, results: str) -> None:
    world = existing_world(os.environ)
    assert world is not None, "is started with the environment of torchrun"
    try_all(Trials.model_validate_json(Path(trials).read_text()), world, Path(results))


if __name__ == "__main__":
    main(*sys.argv[1:])

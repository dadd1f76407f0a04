"""The cases of the parity matrix, made by rule: every schedule in every arrangement, all else covered pair by pair."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.pairwise import covering
from tests.runtime.tiny import RICH

from pipermoe.schedule.builders import RECIPES, illegal
from pipermoe.specs.legality import LEGAL, violations
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.runtimes.own import EXECUTABLE
from pipermoe.specs.strategy import RECOMPUTE_MODULES, Strategy
from pipermoe.specs.train import Optimizer, TrainConfig

TRAIN = TrainConfig(
    seq_len=8,
    global_batch_size=16,
    auxiliary_loss=0.5,
    z_loss=0.3,
    optimizer=Optimizer(learning_rate=1e-2, gradient_clip=0.5, epsilon=1e-4),
)
SCHEDULES = tuple(RECIPES)
# (pipeline, data, expert parallel)
ARRANGEMENTS = (
    *((1, 2, 1), (1, 2, 2), (1, 4, 1), (1, 4, 2), (1, 4, 4), (1, 8, 4)),
    *((2, 1, 1), (2, 2, 1), (2, 2, 2), (2, 4, 2), (2, 4, 4)),
    *((4, 1, 1), (4, 2, 1), (4, 2, 2)),
)
PIPELINES = ((2, 3, 1), (2, 4, 1), (6, 1, 1), (8, 1, 1))  # more of them, for what needs one
OPTIONS: dict[str, tuple[Any, ...]] = {
    "recompute": ("none", "full", "selective"),
    "zero_dense": (0, 1, 2, 3),
    "zero_expert": (0, 1, 2, 3),
    "dispatcher": ("all_to_all", "deduplicated", "deduplicated by node"),
    "split": ("even", "uneven"),
    "rank_order": ("dp-pp", "pp-dp"),
    "capacity_factor": (0.0, 1.0),
}


@dataclass(frozen=True, slots=True)
class Job:
    """What a case trains, as small as its arrangement allows; cases that train the same have one reference."""

    layers: int
    microbatches: int
    capacity_factor: float

    @property
    def model(self) -> ModelSpec:
        return RICH.model_copy(update={"name": f"of {self.layers} layers", "num_layers": self.layers})

    @property
    def train(self) -> TrainConfig:
        return TRAIN.model_copy(
            update={"global_batch_size": self.microbatches, "capacity_factor": self.capacity_factor}
        )


@dataclass(frozen=True, slots=True)
class Case:
    strategy: Strategy
    job: Job

    def __str__(self) -> str:
        return f"{self.strategy}, {self.job}"


@cache
def cases() -> list[Case]:
    """One for each schedule and arrangement that can meet; options pair by pair.

    What the runtime does not execute takes no part.
    """
    values = {option: [value for value in values if _runs(option, value)] for option, values in OPTIONS.items()}
    rows = [
        (schedule, arrangement)
        for schedule in SCHEDULES
        for arrangement in (*ARRANGEMENTS, *(PIPELINES if RECIPES[schedule].ranks_step > 1 else ()))
        if not illegal(schedule, arrangement[0], 2 * arrangement[0], _chunks(schedule))
    ]
    return [_case(schedule, arrangement, options) for (schedule, arrangement), options in covering(rows, values)]


def _microbatches(schedule: str, arrangement: tuple[int, int, int]) -> int:
    """Of one data-parallel rank: one more than fill the pipeline, or as many more as the schedule asks for."""
    stages = arrangement[0]
    return next(m for m in range(stages + 1, 4 * stages) if not illegal(schedule, stages, m, _chunks(schedule)))


def _layers(schedule: str, arrangement: tuple[int, int, int]) -> int:
    """One more than stages, the first of them dense, but enough for weights to come and go."""
    return max(3, arrangement[0] * _chunks(schedule) + 1)


def _chunks(schedule: str) -> int:
    return RECIPES[schedule].virtual_stages[0]


def _case(schedule: Any, arrangement: Any, options: dict[str, Any]) -> Case:
    job = Job(
        _layers(schedule, arrangement),
        arrangement[1] * _microbatches(schedule, arrangement),
        options["capacity_factor"],
    )
    return Case(_strategy(schedule, arrangement, options), job)


def _strategy(schedule: Any, arrangement: Any, options: dict[str, Any]) -> Strategy:
    pp, dp, ep = arrangement
    stages = pp * _chunks(schedule)
    uneven = (*[1] * (stages - 1), _layers(schedule, arrangement) - stages + 1)
    return Strategy(
        pipeline_parallel=pp,
        virtual_stages=_chunks(schedule),
        data_parallel=dp,
        expert_parallel=ep,
        expert_data_parallel=dp // ep,
        schedule=schedule,
        layer_split=uneven if options["split"] == "uneven" else (),
        recompute_modules=RECOMPUTE_MODULES if options["recompute"] == "selective" else (),
        dispatcher="deduplicated" if "deduplicated" in options["dispatcher"] else "all_to_all",
        ranks_per_copy=2 if "node" in options["dispatcher"] and ep > 2 else 1,
        **{key: options[key] for key in ("recompute", "rank_order", "zero_dense", "zero_expert")},
    )


def _runs(option: str, value: Any) -> bool:
    """Whether the runtime executes this value, all other options having their defaults."""
    strategy = _strategy("gpipe", (1, 2, 2), {name: values[0] for name, values in OPTIONS.items()} | {option: value})
    return not violations(strategy, RICH, TRAIN, strategy.world_size, (*LEGAL, *EXECUTABLE))


def place(strategy: Strategy) -> tuple[int, ...]:
    """What the process groups of a strategy follow from."""
    degrees = ("pipeline_parallel", "stage_homes", "data_parallel", "expert_parallel", "ranks_per_copy")
    return strategy.world_size, *(getattr(strategy, degree) for degree in degrees)


def portions(size: int) -> Iterator[list[Case]]:
    """The cases in portions of at most `size`, each for one number of ranks and few arrangements, but of the first.

    That is a sample: `size` of those for four ranks, of all schedules and arrangements.
    """
    of_four = [case for case in cases() if case.strategy.world_size == 4]
    sample = of_four[:: len(of_four) // size][:size]
    yield sample
    rest = sorted((case for case in cases() if case not in sample), key=lambda case: place(case.strategy))
    for _, group in itertools.groupby(rest, key=lambda case: case.strategy.world_size):
        portion = list(group)
        yield from (portion[start : start + size] for start in range(0, len(portion), size))

"""The cases of the parity matrix, made by rule: every schedule in every arrangement, all else covered pair by pair."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from tests.runtime.tiny import RICH

from pipermoe.schedule.builders import RECIPES, illegal
from pipermoe.specs.legality import violations
from pipermoe.specs.strategy import RECOMPUTE_MODULES, Strategy
from pipermoe.specs.train import Optimizer, TrainConfig

# Deep enough for eight stages, one of which then holds two layers.
MODEL = RICH.model_copy(update={"name": "deep", "num_layers": 9})
TRAIN = TrainConfig(
    seq_len=8,
    global_batch_size=16,
    auxiliary_loss=0.5,
    z_loss=0.3,
    optimizer=Optimizer(learning_rate=1e-2, gradient_clip=0.5, epsilon=1e-4),
)
SCHEDULES = tuple(name for name in RECIPES if name != "dualpipe")  # it holds every stage twice, which is refused
# (pipeline, data, expert parallel)
ARRANGEMENTS = (
    *((1, 2, 1), (1, 2, 2), (1, 4, 1), (1, 4, 2), (1, 4, 4), (1, 8, 4)),
    *((2, 1, 1), (2, 2, 1), (2, 2, 2), (2, 4, 2), (2, 4, 4)),
    *((4, 1, 1), (4, 2, 1), (4, 2, 2)),
)
OPTIONS: dict[str, tuple[Any, ...]] = {
    "recompute": ("none", "full", "selective"),
    "zero_dense": (0, 1, 2, 3),
    "zero_expert": (0, 1, 2, 3),
    "dispatcher": ("all_to_all", "deduplicated"),
    "split": ("even", "uneven"),
    "capacity_factor": (0.0, 1.0),
}


@cache
def cases() -> list[tuple[Strategy, float]]:
    """(strategy, capacity factor), one for each schedule and arrangement that can meet.

    The options of each are those that cover most pairs of values that no case had before: of options among themselves
    and of an option with a schedule or an arrangement; all pairs covered, those used least. What the runtime does not
    execute takes no part.
    """
    values = {option: [value for value in values if _runs(option, value)] for option, values in OPTIONS.items()}
    combinations = [dict(zip(OPTIONS, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    inner = [set(itertools.combinations(options.items(), 2)) for options in combinations]
    covered: set[tuple] = set()
    used = [0] * len(combinations)
    chosen = []

    def gain(i: int, schedule: str, arrangement: tuple[int, int, int]) -> tuple[int, int]:
        met = sum((each, item) not in covered for each in (schedule, arrangement) for item in combinations[i].items())
        return len(inner[i] - covered) + met, -used[i]

    for schedule, arrangement in itertools.product(SCHEDULES, ARRANGEMENTS):
        if illegal(schedule, arrangement[0], TRAIN.global_batch_size // arrangement[1], _chunks(schedule)):
            continue
        best = max(range(len(used)), key=partial(gain, schedule=schedule, arrangement=arrangement))
        used[best] += 1
        covered.update(inner[best], itertools.product((schedule, arrangement), combinations[best].items()))
        chosen.append((_strategy(schedule, arrangement, combinations[best]), combinations[best]["capacity_factor"]))
    return chosen


def _chunks(schedule: str) -> int:
    return RECIPES[schedule].virtual_stages[0]


def _strategy(schedule: str, arrangement: tuple[int, int, int], options: dict[str, Any]) -> Strategy:
    pp, dp, ep = arrangement
    stages = pp * _chunks(schedule)
    uneven = (MODEL.num_layers - stages + 1, *[1] * (stages - 1))
    return Strategy(
        pipeline_parallel=pp,
        virtual_stages=_chunks(schedule),
        data_parallel=dp,
        expert_parallel=ep,
        expert_data_parallel=dp // ep,
        schedule=schedule,
        layer_split=uneven if options["split"] == "uneven" else (),
        recompute_modules=RECOMPUTE_MODULES if options["recompute"] == "selective" else (),
        **{key: options[key] for key in ("recompute", "zero_dense", "zero_expert", "dispatcher")},
    )


def _runs(option: str, value: Any) -> bool:
    """Whether the runtime executes this value, all other options having their defaults."""
    strategy = _strategy("gpipe", (1, 2, 2), {name: values[0] for name, values in OPTIONS.items()} | {option: value})
    return not violations(strategy, MODEL, TRAIN, strategy.world_size)


def portions(size: int) -> Iterator[list[tuple[Strategy, float]]]:
    """The cases in portions of at most `size`, each for one number of ranks."""
    found = sorted(cases(), key=lambda case: case[0].world_size)
    for _, group in itertools.groupby(found, key=lambda case: case[0].world_size):
        portion = list(group)
        yield from (portion[start : start + size] for start in range(0, len(portion), size))

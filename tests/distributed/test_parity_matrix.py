"""Every schedule in every arrangement trains as one process does: loss, gradients, gradient norm, updated weights.

Several cases share one world of forked ranks. `make test` runs one portion, `make test-slow` all.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.distributed.harness import run_ranks
from tests.distributed.parity_cases import ARRANGEMENTS, MODEL, SCHEDULES, TRAIN, cases, portions
from tests.runtime.tiny import batch_for, engine_for

from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.runtime.pipeline.gradients import gradient_of
from pipermoe.runtime.weights import is_expert
from pipermoe.specs.strategy import Strategy

TOLERANCE = 1e-5
PORTIONS = list(portions(12))
FAST = next(i for i, portion in enumerate(PORTIONS) if portion[0][0].world_size == 4)

pytestmark = pytest.mark.distributed


def one_step(groups: ProcessGroups, strategy: Strategy, capacity_factor: float) -> dict[str, Any]:
    """One training step: sums over the whole job, and this rank's gradients and weights by name."""
    train = TRAIN.model_copy(update={"capacity_factor": capacity_factor})
    engine = engine_for(MODEL, strategy, groups, train)
    optimizer = Optimizer(engine.flats, train.optimizer)
    result = engine.step(batch_for(strategy, groups.coordinates.dp, 0, MODEL, train))
    optimizer.reduce_gradients()
    sums = torch.stack(
        (result.loss, result.auxiliary, result.z_loss, result.dropped, optimizer.owned_squared_norm().float())
    )
    dist.all_reduce(sums)
    whole = strategy.zero_dense == strategy.zero_expert == 0
    gradients = {name: gradient_of(each).clone() for name, each in engine.named_parameters()} if whole else {}
    optimizer.update(sums[-1].sqrt().item(), train.optimizer.learning_rate)
    optimizer.gather_weights()
    return {
        "sums": sums,
        "gradients": gradients,
        "weights": {name: each.detach().clone() for name, each in engine.named_state()},
    }


def differences(rank: int, portion: list[tuple[Strategy, float]], references: dict[float, dict]) -> list[str]:
    """What differs from one process, a line each."""
    found, made = [], {}
    for strategy, capacity_factor in portion:
        place = (strategy.pipeline_parallel, strategy.data_parallel, strategy.expert_parallel)
        if place not in made:
            made[place] = ProcessGroups.create(strategy)
        groups, expected = made[place], references[capacity_factor]
        here = one_step(groups, strategy, capacity_factor)
        relative = np.abs(here["sums"].numpy() / np.where(expected["sums"] == 0, 1, expected["sums"]) - 1)
        errors = {"sums": float(relative[expected["sums"] != 0].max())}
        for kind in ("gradients", "weights"):
            for name, value in here[kind].items():
                reference = expected[kind][name]
                if is_expert(name):
                    reference = np.split(reference, strategy.expert_parallel)[groups.coordinates.ep]
                error = np.linalg.norm(value.detach().numpy() - reference) / np.linalg.norm(reference)
                errors[f"{kind} of {name}"] = float(error)
        found += [
            f"rank {rank}, {strategy}: {what}: relative error {error:.1e}"
            for what, error in errors.items()
            if not error < TOLERANCE
        ]
    return found


def reference(rank: int, capacity_factor: float) -> dict[str, Any]:
    strategy = Strategy(schedule="gpipe")
    return one_step(ProcessGroups.create(strategy), strategy, capacity_factor)


@cache
def references() -> dict[float, dict]:
    return {factor: run_ranks(reference, 1, factor)[0] for factor in (0.0, 1.0)}


def test_capacity_drops_choices_in_the_reference():
    assert references()[0.0]["sums"][3] == 0 < references()[1.0]["sums"][3] < 1


@pytest.mark.parametrize(
    "portion",
    [pytest.param(i, marks=() if i == FAST else pytest.mark.slow) for i in range(len(PORTIONS))],
)
def test_every_case_equals_one_process(portion: int):
    chosen = PORTIONS[portion]
    found = run_ranks(differences, chosen[0][0].world_size, chosen, references(), timeout=110)
    assert [line for lines in found for line in lines] == []


def test_every_schedule_meets_twelve_arrangements_at_least():
    for schedule in SCHEDULES:
        met = {(s.pipeline_parallel, s.data_parallel, s.expert_parallel) for s, _ in cases() if s.schedule == schedule}
        assert len(met) >= 12
        assert met <= set(ARRANGEMENTS)

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
from tests.distributed.parity_cases import ARRANGEMENTS, PIPELINES, SCHEDULES, Case, Job, cases, place, portions
from tests.runtime.tiny import batch_for, engine_for, lowered

from pipermoe.modules.names import is_expert
from pipermoe.modules.weight_gradients import gradient_of
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.specs.strategy import Strategy

TOLERANCE = 1e-5
PORTIONS = list(portions(12))

pytestmark = pytest.mark.distributed


def one_step(groups: ProcessGroups, strategy: Strategy, job: Job) -> dict[str, Any]:
    """One training step: sums over the whole job, and this rank's gradients and weights by name."""
    engine = engine_for(job.model, strategy, groups, job.train)
    optimizer = Optimizer(engine.flats, job.train.optimizer)
    result = engine.step(batch_for(strategy, groups.coordinates.dp, 0, job.model, job.train))
    optimizer.reduce_gradients()
    sums = torch.stack(
        (result.loss, result.auxiliary, result.z_loss, result.dropped, optimizer.owned_squared_norm().float())
    )
    dist.all_reduce(sums)
    whole = strategy.zero_dense == strategy.zero_expert == 0
    gradients = {name: gradient_of(each).clone() for name, each in engine.named_parameters()} if whole else {}
    optimizer.update(sums[-1].sqrt().item(), job.train.optimizer.learning_rate)
    optimizer.gather_weights()
    return {
        "sums": sums,
        "gradients": gradients,
        "weights": {name: each.detach().clone() for name, each in engine.named_state()},
    }


def differences(rank: int, portion: list[Case], references: dict[Job, dict]) -> list[str]:
    """What differs from one process, a line each."""
    found, made = [], {}
    for case in portion:
        strategy, expected = case.strategy, references[case.job]
        if place(strategy) not in made:
            made[place(strategy)] = ProcessGroups.create(strategy)
        groups = made[place(strategy)]
        try:
            here = one_step(groups, strategy, case.job)
        except Exception as error:
            raise AssertionError(f"{case}") from error
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
            f"rank {rank}, {case}: {what}: relative error {error:.1e}"
            for what, error in errors.items()
            if not error < TOLERANCE
        ]
    return found


def one_process(rank: int, job: Job) -> dict[str, Any]:
    strategy = Strategy(schedule="gpipe")
    return one_step(ProcessGroups.create(strategy), strategy, job)


@cache
def reference(job: Job) -> dict[str, Any]:
    return run_ranks(one_process, 1, job)[0]


def test_capacity_drops_choices_in_the_references():
    for job in {case.job for case in cases() if case.job.layers == 3 and case.job.microbatches in (3, 4)}:
        assert (reference(job)["sums"][3] > 0) == (job.capacity_factor > 0)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "portion",
    [pytest.param(i, marks=() if i == 0 else pytest.mark.slow) for i in range(len(PORTIONS))],
)
def test_every_case_equals_one_process(portion: int):
    chosen = PORTIONS[portion]
    expected = {case.job: reference(case.job) for case in chosen}
    for case in chosen:
        lowered(case.strategy, case.job.train.global_batch_size)
    found = run_ranks(differences, chosen[0].strategy.world_size, chosen, expected, timeout=240)
    assert [line for lines in found for line in lines] == []


def test_every_schedule_meets_twelve_arrangements_at_least():
    for schedule in SCHEDULES:
        strategies = [case.strategy for case in cases() if case.strategy.schedule == schedule]
        met = {(each.pipeline_parallel, each.data_parallel, each.expert_parallel) for each in strategies}
        assert len(met) >= 12
        assert met <= {*ARRANGEMENTS, *PIPELINES}

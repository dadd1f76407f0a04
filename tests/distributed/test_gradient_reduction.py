"""Gradients that stay whole (ZeRO-0 and 1) set out for their sums over ranks behind the last backwards of a step."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
from tests.distributed.harness import run_ranks
from tests.runtime.tiny import MODELS, batch_for, engine_for, job_of, reduced_gradients

from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.optimizer.flat_parameters import FlatParameters, Landed
from pipermoe.runtime.optimizer.sharding import Sharding
from pipermoe.schedule.action import Kind, Schedule
from pipermoe.schedule.builders import schedule_of
from pipermoe.specs.strategy import Strategy

pytestmark = pytest.mark.distributed

AFTER = "after the pipeline"
Launched = list[tuple[str, str]]


def reductions(rank: int, model: str, text: str, early: bool) -> tuple[Launched, list[bytes]]:
    """(unit, during which action) of every reduction in the order of launches, and the gradients that this rank owns.

    Without `early` all reductions are launched after the pipeline.
    """
    strategy, launched, launch = Strategy.parse(text), [], FlatParameters.launch_reduction
    engine = engine_for(MODELS[model], strategy, ProcessGroups.create(strategy), job_of(model))

    def noted(flat: FlatParameters, *landed: Landed) -> None:
        if flat.ranks > 1:
            launched.append((flat.unit, str(engine.meter.action)))
        launch(flat, *landed)

    with (
        mock.patch.object(FlatParameters, "launch_reduction", noted),
        nullcontext() if early else mock.patch.object(Sharding, "filled"),
    ):
        engine.step(batch_for(strategy, engine.groups.coordinates.dp, 0))
        engine.meter.action = AFTER
        reduced_gradients(engine)
    return launched, [flat.of_owned(flat.gradients).numpy().tobytes() for flat in engine.flats]


def last_to_fill(schedule: Schedule, rank: int) -> set[str]:
    """The last actions of a pipeline rank that add to the gradients of each of its stages."""
    filling = (part for part in schedule.parts(rank) if part.kind in (Kind.BACKWARD, Kind.WEIGHT_GRAD))
    return set({part.stage: str(part) for part in filling}.values())


@pytest.mark.parametrize(
    ("model", "text"),
    [("tied", "dp2"), ("rich", "pp2 dp2 ep2 zb-h1 z1"), ("predicting", "pp2 vpp2 dp2 dualpipe-v")],
)
def test_gradients_set_out_with_the_last_backward_of_their_layer_and_their_sums_stay_the_same(model: str, text: str):
    strategy = Strategy.parse(text)
    schedule = schedule_of(strategy, job_of(model).global_batch_size)
    early, late = (run_ranks(reductions, strategy.world_size, model, text, each) for each in (True, False))
    for rank, ((launched, gradients), (at_end, expected)) in enumerate(zip(early, late, strict=True)):
        assert gradients == expected
        assert {during for _, during in launched} == last_to_fill(schedule, rank // 2)
        assert {during for _, during in at_end} == {AFTER}
        assert sorted(unit for unit, _ in launched) == sorted(unit for unit, _ in at_end)
        assert launched == early[rank ^ 1][0]  # both ranks of the group, in the same order

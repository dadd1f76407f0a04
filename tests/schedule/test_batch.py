"""Many candidates in one walk: each gets exactly the timeline that it has alone."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.schedule.grids import SLOWLY, pipelines

from pipermoe.schedule.action import Action, Kind, Schedule
from pipermoe.schedule.batch import end_seconds
from pipermoe.schedule.builders import build
from pipermoe.schedule.communication import with_communication
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.sharding import with_gathered_weights, with_reduction
from pipermoe.schedule.timeline import simulate

FIELDS = [field.name for field in dataclasses.fields(Durations) if field.name not in ("backward", "overlap_efficiency")]


def draw_durations(seed: int, stages: int, candidates: int) -> list[Durations]:
    """Random seconds for every field and stage; a fifth of them zero."""
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(candidates):
        values = random.uniform(0.1, 3.0, (len(FIELDS), stages)) * (random.uniform(size=(len(FIELDS), stages)) > 0.2)
        times = dict(zip(FIELDS, values.tolist(), strict=True))
        drawn.append(Durations(**times, overlap_efficiency=0.8))
    return drawn


def assert_each_as_alone(schedule: Schedule, candidates: list[Durations]) -> None:
    together = end_seconds(schedule, candidates)
    alone = [[max(ends, default=0.0) for ends in simulate(schedule, times).end] for times in candidates]
    assert together.tolist() == alone


@SLOWLY
@given(st.integers(0, 2**32), pipelines(most_ranks=4, most_microbatches=9))
def test_every_candidate_ends_when_it_does_alone(seed, schedule):
    assert_each_as_alone(schedule, draw_durations(seed, schedule.num_stages, candidates=3))


@pytest.mark.parametrize("change", [with_communication, with_gathered_weights, with_reduction])
def test_also_with_sends_and_collectives_as_actions(change):
    schedule = change(build("interleaved-1f1b", 4, 8, 2))
    assert_each_as_alone(schedule, draw_durations(7, schedule.num_stages, candidates=3))


def test_a_schedule_that_waits_for_itself_is_named():
    stuck = Schedule.of("stuck", 1, (0, 1), [[Action(Kind.FORWARD, 0, 0)], [Action(Kind.BACKWARD, 0, 0)]])
    with pytest.raises(ValueError, match="stuck cannot run to its end: rank 1"):
        end_seconds(stuck, [Durations()])

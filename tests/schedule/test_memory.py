"""Activations in flight, by count and by bytes."""

import pytest
from hypothesis import given
from tests.schedule.grids import NAMES, SLOWLY, pipelines, virtual_stages

from pipermoe.schedule.action import Action, Kind, Schedule, overlap
from pipermoe.schedule.builders import build
from pipermoe.schedule.memory import in_flight, peak_activation_bytes
from pipermoe.schedule.timeline import simulate

F, B = Kind.FORWARD, Kind.BACKWARD


@SLOWLY
@given(pipelines())
def test_memory_over_time_peaks_at_the_activations_in_flight(schedule):
    timeline, ones = simulate(schedule), [1.0] * schedule.num_stages
    for rank in range(schedule.num_ranks):
        profile = timeline.memory(rank, ones)
        assert max(held for _, held in profile) == in_flight(schedule).rank[rank]
        assert profile[-1][1] == 0.0  # everything is freed
        assert [when for when, _ in profile] == sorted(when for when, _ in profile)


def test_an_input_gradient_frees_what_the_weight_gradient_does_not_need():
    schedule = build("zb-h1", 2, 3)
    assert peak_activation_bytes(schedule, [10.0, 20.0]) == (20.0, 40.0)
    assert peak_activation_bytes(schedule, [10.0, 20.0], [2.0, 4.0]) == (20.0, 24.0)


def test_activations_of_a_pair_count_together():
    actions = [Action(F, 0, 0), overlap(Action(F, 0, 1), Action(B, 0, 0)), Action(B, 0, 1)]
    assert in_flight(Schedule.of("pair", 2, (0,), [actions])).rank == (2,)


@pytest.mark.parametrize("name", NAMES)
def test_stages_of_a_rank_together_are_its_peak_at_most(name):
    schedule = build(name, 4, 8, virtual_stages(name))
    flight = in_flight(schedule)
    for rank in range(4):
        assert flight.rank[rank] <= sum(flight.stage[stage] for stage in schedule.stages_of(rank))

"""Optimized schedules: never worse than a named one, always within memory, always sound."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.schedule.grids import SLOWLY

from pipermoe.schedule.builders import RECIPES, build, illegal
from pipermoe.schedule.builders.optimized import optimize
from pipermoe.schedule.checker import check
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.memory import in_flight, peak_activation_bytes
from pipermoe.schedule.timeline import simulate
from pipermoe.specs.errors import UserError


@st.composite
def jobs(draw):
    """(pp, micro-batches, vpp, durations, bytes per stage, limit per rank) with uneven stages."""
    p, m, v = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    values = st.lists(st.floats(0.5, 2.0), min_size=p * v, max_size=p * v)
    exchange = draw(st.sampled_from([0.0, 0.25, 1.0]))
    times = Durations(draw(values), draw(values), draw(values), None, exchange, exchange, transfer=0.05)
    size = draw(values)
    return p, m, v, times, size, sum(size) * draw(st.floats(1.0, 2.0 * p))


@SLOWLY
@given(jobs())
def test_it_is_sound_fits_and_beats_every_named_schedule_that_fits(job):
    p, m, v, times, size, limit = job
    best = optimize(p, m, v, times, size, limit)
    assert check(best) == []
    assert max(peak_activation_bytes(best, size)) <= limit * (1 + 1e-9)
    seconds = simulate(best, times).step_seconds
    for name in RECIPES:
        if illegal(name, p, m, v) or name == "dualpipe":
            continue
        named = build(name, p, m, v)
        if max(peak_activation_bytes(named, size)) <= limit:
            assert seconds <= simulate(named, times).step_seconds


def test_memory_between_two_named_schedules_buys_time_between_them():
    """ZB-H1 holds 4 activations, ZB-H2 7; with 5 and 6 the list scheduler fills part of the bubble."""
    step = [simulate(optimize(4, 12, 1, Durations(), memory_limit=limit)).step_seconds for limit in (4, 5, 6, 7)]
    assert step == sorted(step, reverse=True)
    assert step[0] <= simulate(build("zb-h1", 4, 12)).step_seconds
    assert step[-1] == simulate(build("zb-h2", 4, 12)).step_seconds


def test_less_memory_than_1f1b_still_gives_a_schedule():
    best = optimize(4, 12, 1, Durations(), memory_limit=2)
    assert max(in_flight(best).rank) == 2
    assert best.name == "optimized"


def test_measured_times_that_no_paper_assumes_are_worth_a_schedule_of_their_own():
    times = Durations([1.0, 1.2, 0.9, 1.1, 0.8, 1.3, 1.0, 1.1], 1.2, 0.7, transfer=0.05)
    named = [build(name, 4, 16, 2) for name in RECIPES if not illegal(name, 4, 16, 2)]
    best = optimize(4, 16, 2, times)
    assert best.name == "optimized"
    assert simulate(best, times).step_seconds < min(simulate(schedule, times).step_seconds for schedule in named)


def test_all_to_alls_make_it_choose_pairs():
    times = Durations(forward_exchange=1.0, backward_exchange=1.0)
    best = optimize(2, 16, 2, times)
    assert simulate(best, times).exchange_seconds[0] < 16 * 2 * 2 / 2  # at least half of them hidden


def test_too_little_memory_names_what_is_needed():
    with pytest.raises(UserError) as error:
        optimize(2, 4, 2, Durations(), memory_limit=1)
    assert str(error.value) == (
        "memory_limit = 1: no schedule keeps its activations within this on every rank; the least that one needs is 2"
    )

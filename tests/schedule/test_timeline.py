"""The simulation: dependencies, overlap, links and memory, on cases that one can count by hand."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.schedule.grids import SLOWLY, pipelines

from pipermoe.schedule.action import Action, Kind, Schedule, overlap, source_of
from pipermoe.schedule.builders import build
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.sharding import with_gathered_weights, with_reduction
from pipermoe.schedule.timeline import simulate

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD  # noqa: E741


@st.composite
def durations(draw, stages: int) -> Durations:
    """Whole and half seconds per stage: sums are exact."""
    values = st.lists(st.integers(1, 8).map(lambda n: n / 2), min_size=stages, max_size=stages)
    return Durations(*(draw(values) for _ in range(3)), transfer=draw(values))


@SLOWLY
@given(st.data(), pipelines(most_ranks=4, most_microbatches=9))
def test_nothing_starts_before_its_rank_and_its_data_and_nothing_waits_longer(data, schedule):
    times = data.draw(durations(schedule.num_stages))
    timeline = simulate(schedule, times)
    end = {
        part: stop
        for rank in range(schedule.num_ranks)
        for action, stop in zip(schedule.ranks[rank], timeline.end[rank], strict=True)
        for part in action.parts
    }
    for rank, actions in enumerate(schedule.ranks):
        previous = 0.0
        for action, start, stop in zip(actions, timeline.start[rank], timeline.end[rank], strict=True):
            arrivals = [produced(schedule, part, rank, end, times) for part in action.parts]
            assert start >= max([previous, *arrivals])  # later only if a link was busy
            assert stop > start
            previous = stop
        assert timeline.compute_seconds[rank] + timeline.idle_seconds(rank) == pytest.approx(timeline.step_seconds)
        assert timeline.transfer_seconds[rank] <= timeline.idle_seconds(rank) + 1e-9


def produced(schedule, part, rank, end, times) -> float:
    """When the data of `part` can be there at the earliest."""
    source = source_of(schedule, part)
    if source is None:
        return 0.0
    kinds = (F,) if part.kind is F else (B, I)
    made = next(end[a] for kind in kinds if (a := Action(kind, source[0], part.microbatch)) in end)
    return made + (times.transfer[source[0]] if source[1] != rank else 0.0)


def test_uneven_stages_wait_for_the_slowest():
    timeline = simulate(build("1f1b", 2, 3), Durations([1.0, 3.0], [1.0, 3.0], [0.0, 0.0]))
    assert timeline.end == ((1.0, 2.0, 8.0, 9.0, 14.0, 20.0), (4.0, 7.0, 10.0, 13.0, 16.0, 19.0))
    assert timeline.step_seconds == 20.0
    assert timeline.bubble_fraction == (14 / 20, 2 / 20)


def test_a_slow_link_carries_one_message_at_a_time():
    timeline = simulate(build("gpipe", 2, 3), Durations(1.0, 1.0, 0.0, transfer=5.0))
    assert timeline.start[1][:3] == (6.0, 11.0, 16.0)  # ready at 1, 2, 3; each occupies the link for 5
    assert timeline.transfer_seconds[1] == 5.0 + 4.0 + 4.0


def test_gradients_may_travel_on_links_of_their_own():
    timeline = simulate(build("gpipe", 3, 1), Durations(1.0, 1.0, 0.0, transfer=[2.0, 3.0, 0.0]))
    assert (timeline.start[2][0], timeline.end[0][1]) == (7.0, 14.0)  # back: 0 s from stage 2, 3 s from stage 1
    exact = Durations(1.0, 1.0, 0.0, transfer=[2.0, 3.0, 0.0], transfer_backward=[0.0, 2.0, 3.0])
    assert simulate(build("gpipe", 3, 1), exact).end[0][1] == 16.0


def test_a_pair_hides_the_shorter_of_compute_and_all_to_all():
    pair = overlap(Action(F, 0, 1), Action(B, 0, 0))
    schedule = Schedule.of("pair", 2, (0,), [[Action(F, 0, 0), pair, Action(B, 0, 1)]])
    times = Durations(2.0, 1.5, 1.5, forward_exchange=1.0, backward_exchange=2.0)
    timeline = simulate(schedule, times)
    assert timeline.end == ((3.0, 8.0, 13.0),)  # 5 s of computation hide 3 s of all-to-all
    assert timeline.exchange_seconds == (1.0 + 0.0 + 2.0,)
    half = simulate(schedule, Durations(2.0, 1.5, 1.5, None, 1.0, 2.0, overlap_efficiency=0.5))
    assert half.exchange_seconds == (1.0 + 1.5 + 2.0,)
    slow = simulate(schedule, Durations(1.0, 0.5, 0.5, None, 4.0, 6.0))
    assert slow.end[0][1] - slow.start[0][1] == 10.0  # all all-to-alls, one after the other


def test_gathering_and_reducing_run_beside_computation():
    schedule = with_gathered_weights(with_reduction(build("gpipe", 1, 2)))
    assert str(schedule) == "0UNSHARD 0F0 0F1 0B0 0B1 0RESHARD 0REDUCE_GRAD"
    timeline = simulate(schedule, Durations(unshard=0.5, reduce=3.0))
    assert timeline.start[0][1] == 0.5
    assert timeline.step_seconds == 0.5 + 6.0 + 3.0


def test_a_schedule_that_cannot_run_says_where_it_stands():
    schedule = Schedule.of("stuck", 1, (0, 1), [[Action(B, 0, 0), Action(F, 0, 0)], [Action(F, 1, 0), Action(B, 1, 0)]])
    with pytest.raises(ValueError, match="schedule stuck cannot run to its end: rank 0 at 0B0, rank 1 at 1F0"):
        simulate(schedule)


def test_durations_per_stage_must_match_the_stages():
    with pytest.raises(ValueError, match="durations: forward has 3 values for 2 stages"):
        simulate(build("gpipe", 2, 1), Durations(forward=[1.0, 2.0, 3.0]))


def test_simulating_takes_a_few_loop_turns_per_action():
    """50 ms for a 61-layer pipeline (benchmarks/schedules.py), told in turns of a plain loop: load slows both alike."""
    schedule = build("interleaved-1f1b", 16, 128, 2)
    layers = [61 // 32 + (stage < 61 % 32) for stage in range(32)]
    times = Durations(layers, layers, layers, forward_exchange=0.25, backward_exchange=0.25, transfer=0.03125)
    actions = sum(map(len, schedule.ranks))

    def turns() -> None:
        table = dict.fromkeys(range(64), 0.0)
        for turn in range(100 * actions):
            table[turn & 63] = table[turn & 63] + 1.0

    ratios = []
    for _ in range(5):
        began = time.process_time()
        turns()
        middle = time.process_time()
        simulate(schedule, times)
        ratios.append((time.process_time() - middle) / (middle - began))
    assert min(ratios) < 1.0  # fewer than 100 turns per action: about 25 are taken

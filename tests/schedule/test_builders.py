"""Every named schedule against the figure and the formulas of its paper, and the errors for what does not exist."""

import pytest
from tests.schedule.grids import virtual_stages

from pipermoe.schedule.builders import RECIPES, build, build_or_read, illegal
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.memory import in_flight
from pipermoe.schedule.timeline import Timeline, simulate
from pipermoe.schedule.torch_csv import write_csv
from pipermoe.specs.errors import UserError

FIGURES = {
    # Narayanan et al. 2021, arXiv 2104.04473, figure 4 top: 4 devices, 8 micro-batches
    ("1f1b", 4, 8, 1): """\
0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0F6 0B3 0F7 0B4 0B5 0B6 0B7
1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1F6 1B4 1F7 1B5 1B6 1B7
2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2F6 2B5 2F7 2B6 2B7
3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5 3F6 3B6 3F7 3B7""",
    # Huang et al. 2019, arXiv 1811.06965, figure 2c
    ("gpipe", 2, 3, 1): "0F0 0F1 0F2 0B0 0B1 0B2\n1F0 1F1 1F2 1B0 1B1 1B2",
    # Lamy-Poirier 2023, arXiv 2211.05953, figure 4d: a chunk after the other
    ("breadth-first", 2, 2, 2): "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1\n1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1",
    # Narayanan et al. 2021, figure 4 bottom, for 2 devices and 4 micro-batches
    ("interleaved-1f1b", 2, 4, 2): """\
0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3
1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3""",
    # Qi et al. 2024, arXiv 2401.10241, figure 2 (ZB-H1) and figure 3 (ZB-H2)
    ("zb-h1", 3, 4, 1): """\
0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3""",
    ("zb-h2", 2, 4, 1): """\
0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
1F0 1I0 1F1 1I1 1F2 1I2 1W0 1F3 1I3 1W1 1W2 1W3""",
    # ibid., figure 8 (ZB-V)
    ("zb-v", 2, 3, 2): """\
0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2""",
    # DeepSeek-V3, arXiv 2412.19437, figure 5, for the smallest DualPipe
    ("dualpipe", 2, 4, 1): """\
0F0 1F1 0F2 1B1 (1F3;0B0)OVERLAP_F_B 1B3 0I2 0W2
0F1 1F0 0F3 1B0 (1F2;0B1)OVERLAP_F_B 1B2 0I3 0W3""",
}


@pytest.mark.parametrize("arguments", FIGURES)
def test_a_schedule_prints_as_its_figure(arguments):
    assert str(build(*arguments)) == FIGURES[arguments]


SIZES = [(1, 3), (2, 4), (3, 9), (4, 8), (4, 20), (6, 18), (8, 24)]
FORWARD, INPUT, WEIGHT = 5.0, 7.0, 4.0
TIMES = Durations(FORWARD, INPUT, WEIGHT)
BOTH = FORWARD + INPUT + WEIGHT


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_gpipe_and_1f1b_idle_for_one_round_trip(name, p, m):  # Narayanan et al. 2021, section 2.2: (p - 1)(F + B)
    timeline = simulate(build(name, p, m), TIMES)
    assert {timeline.idle_seconds(rank) for rank in range(p)} == {(p - 1) * BOTH}


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 9), (4, 8), (4, 20), (8, 24)])
@pytest.mark.parametrize("v", [2, 3, 5])
def test_interleaving_divides_the_bubble_by_the_chunks(p, m, v):  # ibid.: (p - 1)(F + B) / v, of F, B of the whole rank
    timeline = simulate(build("interleaved-1f1b", p, m, v), TIMES)
    assert {timeline.idle_seconds(rank) for rank in range(p)} == {(p - 1) * BOTH}


@pytest.mark.parametrize(("v", "percent"), [(1, 48.4), (3, 23.8), (6, 13.5)])
def test_bubbles_that_amd_computes_for_pp16_and_16_microbatches(
    v, percent
):  # AMD Primus, moe_package README, figure 10
    schedule = build("interleaved-1f1b" if v > 1 else "1f1b", 16, 16, v)
    assert round(100 * simulate(schedule).bubble_fraction[0], 1) == percent


def busy_spans(timeline: Timeline) -> list[float]:
    """From each rank's first start to its last end."""
    return [max(end) - min(start) for start, end in zip(timeline.start, timeline.end, strict=True)]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_zb_h1_has_a_third_of_the_bubble(p, m):  # Qi et al. 2024, table 1: (p - 1)(T_F + T_B - T_W)
    spans = busy_spans(simulate(build("zb-h1", p, m), TIMES))
    assert max(spans) - m * BOTH == (p - 1) * (FORWARD + INPUT - WEIGHT)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_zb_h2_pays_for_short_weight_gradients_only(p, m):  # ibid.: (p - 1)(T_F + T_B - 2 T_W)
    if m >= 2 * p - 1:
        spans = busy_spans(simulate(build("zb-h2", p, m), TIMES))
        assert max(spans) - m * BOTH == (p - 1) * (FORWARD + INPUT - 2 * WEIGHT)


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m >= 2 * p])
@pytest.mark.parametrize(("name", "v"), [("zb-h2", 1), ("zb-v", 2)])
def test_zero_bubble_is_zero_when_f_i_and_w_are_equal(name, v, p, m):  # ibid., sections 2.2 and 5
    timeline = simulate(build(name, p, m, v), Durations(3.0, 3.0, 3.0))
    assert busy_spans(timeline) == [9.0 * m * v] * p


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 20), (6, 12), (8, 24)])
@pytest.mark.parametrize("weight", [2.0, 3.0])
def test_dualpipe_idles_for_half_the_ranks(p, m, weight):  # DualPipe README: (PP/2 - 1)(F&B + B - 3W)
    times = Durations(3.0, 3.0, weight, forward_exchange=1.0, backward_exchange=1.0)
    timeline = simulate(build("dualpipe", p, m), Durations(3.0, 3.0, weight))
    pair, backward = 6.0 + weight, 3.0 + weight
    assert timeline.idle_seconds(0) == (p // 2 - 1) * (pair + backward - 3 * weight)
    hidden = simulate(build("dualpipe", p, m), times)
    assert hidden.exchange_seconds[0] < simulate(build("1f1b", p, m), times).exchange_seconds[0] == 2.0 * m


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 20), (6, 12)])
def test_both_homes_of_a_dualpipe_stage_do_the_same_in_the_same_order(p, m):
    schedule = build("dualpipe", p, m)
    work = [[(part.kind, part.stage, part.microbatch // 2) for part in schedule.parts(rank)] for rank in range(p)]
    assert work == work[::-1]


@pytest.mark.parametrize(("p", "m"), [(2, 4), (3, 6), (4, 12)])
def test_dualpipe_v_idles_as_dualpipe_on_twice_the_ranks(p, m):  # same README, "DualPipeV"
    assert (
        simulate(build("dualpipe-v", p, m, 2)).idle_seconds(0)
        == simulate(build("dualpipe", 2 * p, 2 * m)).idle_seconds(0)
        == 2 * (p - 1)
    )


ACTIVATIONS = {
    # per rank, in units of one stage and micro-batch
    "gpipe": lambda p, m: [m] * p,
    "1f1b": lambda p, m: [p - r for r in range(p)],  # Narayanan et al. 2021, section 2.2
    "1f1b-overlap": lambda p, m: [2 * (p - r) for r in range(p)],
    "breadth-first": lambda p, m: [2 * m] * p,  # Lamy-Poirier 2023, table 4.1
    "interleaved-1f1b": lambda p, m: [p + 2 * (p - 1 - r) + 1 for r in range(p)],  # Korthikanti et al. 2022, 4.2.3
    "interleaved-1f1b-overlap": lambda p, m: [p + 2 * (p - 1 - r) + 2 for r in range(p)],
    "zb-h1": lambda p, m: [p] * p,  # Qi et al. 2024, table 1: p M_B
    "zb-h2": lambda p, m: [2 * p - 1] * p,  # ibid.: (2 p - 1) M_B
    "zb-v": lambda p, m: [2 * p] * p,  # ibid., section 6: as 1F1B; a stage is half as large
    "dualpipe": lambda p, m: [p + 1] * p,  # DualPipe README: PP + 1
    "dualpipe-v": lambda p, m: [2 * p + 1] * p,  # same README, PP = 2 p half stages
}


@pytest.mark.parametrize("p", [2, 4, 6])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_flight_are_those_of_the_paper(name, p):
    m = 4 * p
    assert list(in_flight(build(name, p, m, virtual_stages(name))).rank) == ACTIVATIONS[name](p, m)


@pytest.mark.parametrize("p", range(2, 17))
def test_memory_controlled_v_schedules_hold_a_half_and_a_third(p):  # Qi et al. 2024b, arXiv 2405.15362, table 1
    """In whole ranks' activations; a stage is half a rank. For p = 2 both hold as much as 1F1B."""
    peaks = [max(in_flight(build(name, p, 2 * p, 2)).rank) / 2 for name in ("v-half", "v-min")]
    assert peaks == [p // 2 + 1, (p + 1) // 3 + 1]


@pytest.mark.parametrize("p", range(3, 17))
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_bubble_of_memory_controlled_v_schedules_is_that_of_their_authors(p, rounds):
    """As their generator prints it (github.com/sail-sg/zero-bubble-pipeline-parallelism), in passes of one stage."""
    half, smallest = (simulate(build(name, p, rounds * p, 2)) for name in ("v-half", "v-min"))
    if p != 5:  # there one less
        assert smallest.idle_seconds(0) == (4 * p - 7 if p % 3 == 0 else 4 * p - 5)
    if rounds > 1:
        assert half.idle_seconds(0) == (3 * p - 7 if p % 2 == 0 else 3 * p - 4)


@pytest.mark.parametrize("name", ["v-half", "v-min", "zb-v"])
@pytest.mark.parametrize("p", [2, 3, 4, 5, 6, 7, 8])
def test_the_bubble_of_a_v_does_not_grow_with_the_microbatches(name, p):
    idle = {simulate(build(name, p, m, 2)).idle_seconds(0) for m in (4 * p, 6 * p)}
    assert len(idle) == 1


FULLY_OVERLAPPED = {name for name in RECIPES if name.endswith("-overlap") or name.startswith("dualpipe")} - {
    "v-half-overlap"
}


@pytest.mark.parametrize("name", sorted(FULLY_OVERLAPPED))
def test_overlapping_hides_all_to_alls_in_the_steady_state(name):
    v = virtual_stages(name)
    times = Durations(1.0, 1.0, 1.0, forward_exchange=0.75, backward_exchange=0.75)
    exposed = [simulate(build(name, 4, m, v), times).exchange_seconds[0] for m in (16, 32)]
    assert exposed[0] == exposed[1] < 16 * 1.5 * v


@pytest.mark.parametrize("p", [2, 3, 4, 7])
def test_v_half_overlap_hides_half_of_the_all_to_alls(p):
    times = Durations(1.0, 1.0, 1.0, forward_exchange=0.5, backward_exchange=0.5)
    exposed = [simulate(build("v-half-overlap", p, m, 2), times).exchange_seconds for m in (4 * p, 8 * p)]
    assert [more - less for less, more in zip(*exposed, strict=True)] == [4 * p * 4 * 0.5 / 2] * p


@pytest.mark.parametrize(
    ("name", "growth"),
    [
        ("zb-h2", lambda p: 1),  # a pair on the last stage takes two activations
        ("zb-v", lambda p: 1),  # of half a rank
        ("v-half", lambda p: 2 * (p % 2)),  # of half a rank
    ],
)
@pytest.mark.parametrize("p", [2, 3, 4, 5, 8])
def test_an_overlapped_variant_is_faster_with_long_all_to_alls_and_keeps_its_memory(name, growth, p):
    v = virtual_stages(name)
    times = Durations(1.0, 1.0, 1.0, forward_exchange=0.5, backward_exchange=0.5)
    alone, paired = build(name, p, 4 * p, v), build(f"{name}-overlap", p, 4 * p, v)
    assert simulate(paired, times).step_seconds < simulate(alone, times).step_seconds
    assert max(in_flight(paired).rank) == max(in_flight(alone).rank) + growth(p)


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_split_pairs_save_bubble_at_the_memory_of_whole_ones(p):
    times = Durations(1.0, 1.0, 1.0, forward_exchange=0.5, backward_exchange=0.5)
    for split, whole, v in (("zb-v-overlap", "dualpipe-v", 2), ("zb-h2-overlap", "zb-h1-overlap", 1)):
        fast, slow = (build(name, p, 4 * p, v) for name in (split, whole))
        assert simulate(fast, times).step_seconds < simulate(slow, times).step_seconds
        assert max(in_flight(fast).rank) == max(in_flight(slow).rank)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1b", 0, 4), "pipeline_parallel = 0: 1f1b needs at least 1; nearest: 1"),
        (("1f1b", 4, 0), "microbatches = 0: 1f1b needs at least 1; nearest: 1"),
        (("1f1b", 4, 8, 2), "virtual_stages = 2: 1f1b needs exactly 1 per pipeline rank; nearest: 1"),
        (("zb-v", 4, 8, 3), "virtual_stages = 3: zb-v needs exactly 2 per pipeline rank; nearest: 2"),
        (
            ("interleaved-1f1b", 4, 8),
            "virtual_stages = 1: interleaved-1f1b needs at least 2 per pipeline rank; nearest: 2",
        ),
        (("dualpipe", 3, 8), "pipeline_parallel = 3: dualpipe needs a multiple of 2 and at least 2; nearest: 2, 4"),
        (("dualpipe", 4, 9), "microbatches = 9: dualpipe needs a multiple of 2 and at least 8; nearest: 8, 10"),
        (
            ("1f1b", 1000, 100_000),
            "microbatches = 100000: stages * microbatches may be 500,000 at most; nearest: 500",
        ),
        (("dualpipe-v", 4, 3, 2), "microbatches = 3: dualpipe-v needs at least 8; nearest: 8"),
    ],
)
def test_an_impossible_schedule_names_the_rule_and_the_way_out(arguments, message):
    with pytest.raises(UserError) as error:
        build(*arguments)
    assert str(error.value) == message


def test_an_unknown_schedule_names_the_nearest_and_all():
    problem = illegal("1F1B", 2, 2)
    assert problem is not None
    assert problem.startswith("schedule = '1F1B': unknown; nearest: 1f1b; known: gpipe, 1f1b, ")


def test_a_schedule_may_be_a_file_or_take_its_fewest_chunks(tmp_path):
    write_csv(build("zb-v", 2, 3, 2), tmp_path / "mine.csv")
    assert build_or_read(str(tmp_path / "mine.csv"), 9, 9).ranks == build("zb-v", 2, 3, 2).ranks
    assert build_or_read("zb-v", 2, 3) == build("zb-v", 2, 3, 2)
    assert build_or_read("interleaved-1f1b", 2, 3, 4) == build("interleaved-1f1b", 2, 3, 4)

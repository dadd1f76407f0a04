import math
from dataclasses import replace

import numpy as np
import pytest
from tests.resources.cases import MODEL, TRAIN, machine

from pipermoe.planner import find_plan
from pipermoe.planner.exact import simulated_seconds
from pipermoe.planner.job import Job
from pipermoe.planner.search import Field
from pipermoe.planner.space import job_space
from pipermoe.resources.bound import step_bound
from pipermoe.resources.peak import peak_bytes
from pipermoe.resources.step import predict
from pipermoe.specs import legality
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.documents import load, save
from pipermoe.specs.errors import NoPlanFits, UserError
from pipermoe.specs.legality import LEGAL, legal_mask
from pipermoe.specs.plan import Plan
from pipermoe.specs.runtimes import RUNTIMES, executed_by
from pipermoe.specs.runtimes.own import EXECUTABLE
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import COLUMNS, SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import format_bytes, format_seconds

MIB = 2**20


# A part of the space with a value or two on every axis, small enough to simulate whole.
PART = {
    "micro_batch_size": [1, 2],
    "schedule": [SCHEDULE_NAMES.index(name) for name in ("gpipe", "1f1b", "interleaved-1f1b", "zb-v", "dualpipe-v")],
    "virtual_stages": [1, 2],
    "recompute": [0, 2],
    "zero_dense": [0, 1, 3],
}


@pytest.mark.parametrize(
    ("slots", "ranks", "budget", "runtimes"),
    [
        (2, 4, 9, (EXECUTABLE,)),
        (4, 4, 100, ((),)),
        (8, 8, 6, (EXECUTABLE,)),
        (4, 4, 100, executed_by("megatron", MODEL, TRAIN)),
    ],
)
def test_the_ranking_is_that_of_simulating_every_strategy(slots, ranks, budget, runtimes):
    job = Job(MODEL, machine(ranks=ranks, compute_slots=slots), TRAIN, ranks, budget * MIB, runtimes=runtimes)
    field = Field.of(job)
    part = field.space.select(**PART)
    places = field.space.places(np.flatnonzero(part.heads), part)
    table = field.space.table(places)
    fits = peak_bytes(MODEL, TRAIN, table) <= job.memory_budget_bytes
    seconds = simulated_seconds(job, table.take(fits))
    ranking = field.best(5, part)
    assert [found.seconds for found in ranking.best] == pytest.approx(np.sort(seconds)[:5], rel=1e-9)
    assert ranking.not_fitting + ranking.pruned + ranking.simulated == len(places)
    assert ranking.not_fitting <= int(np.count_nonzero(~fits))
    for found in ranking.best:
        report = predict(MODEL, job.platform, TRAIN, field.space.strategy(found.place))
        assert found.seconds == report.step_seconds
        assert found.peak_bytes == max(rank.peak_bytes for rank in report.ranks)


@pytest.mark.parametrize("runtime", ["pipermoe", "megatron", "torchtitan", "deepspeed", "any"])
def test_the_space_of_a_runtime_is_what_it_accepts_of_all_that_is_legal(runtime):
    model, platform = load_model("qwen3-30b-a3b"), machine(ranks=4, compute_slots=4)
    train = TRAIN.model_copy(update={"precision": "bf16", "seq_len": 64})
    legal = job_space(Job(model, platform, train, 4, 2**40, runtimes=((),)))
    everything = legal.table(legal.places(np.arange(len(legal.heads)), legal.select()))
    names = RUNTIMES if runtime == "any" else [runtime]
    judged = legality.Job(model, train, 4)
    accepted = np.logical_or.reduce([RUNTIMES[name].accepts(everything, judged) for name in names])
    limited = job_space(Job(model, platform, train, 4, 2**40, runtimes=executed_by(runtime, model, train)))
    found = limited.table(limited.places(np.arange(len(limited.heads)), limited.select()))
    rows = [
        {tuple(getattr(table, name)[i] for name in COLUMNS) for i in range(len(table))}
        for table in (everything.take(accepted), found)
    ]
    assert len(rows[0]) == limited.count(limited.select())
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_what_is_not_simulated_is_faster_by_the_tolerance_at_most():
    exact = Job(MODEL, machine(), TRAIN, 4, 9 * MIB)
    [best] = Field.of(exact).best().best
    rough = Field.of(replace(exact, tolerance=0.05)).best()
    assert best.seconds <= rough.best[0].seconds <= best.seconds / 0.95
    assert rough.simulated <= Field.of(exact).best().simulated


def test_the_search_simulates_only_a_part_and_accounts_for_every_strategy():
    counts = find_plan(MODEL, machine(), TRAIN, world_size=4, top=3).counts
    assert counts is not None
    assert counts.considered == (
        counts.illegal + counts.redundant + counts.not_fitting + counts.pruned + counts.simulated
    )
    assert 3 <= counts.simulated < counts.simulated + counts.pruned


def test_the_best_with_a_given_value_is_the_fastest_of_those_that_have_it():
    field = Field.of(Job(MODEL, machine(), TRAIN, 4, 9 * MIB))
    part = field.space.select(**PART | {"recompute": 2, "expert_parallel": [2, 4]})
    [best] = field.best(1, part).best
    strategy = field.space.strategy(best.place)
    assert strategy.recompute == "full"
    assert strategy.expert_parallel > 1
    everything = field.space.places(np.flatnonzero(part.heads), part)
    seconds = simulated_seconds(field.job, field.space.table(everything))
    peaks = peak_bytes(MODEL, TRAIN, field.space.table(everything))
    assert best.seconds == pytest.approx(seconds[peaks <= 9 * MIB].min(), rel=1e-9)
    assert field.bound[field.promising(part) // len(field.space.tails)] <= best.seconds


def test_no_bound_of_a_head_exceeds_that_of_its_strategies():
    field = Field.of(Job(MODEL, machine(ranks=8, compute_slots=3), TRAIN, 8, 2**40))
    places = field.space.places(np.arange(0, len(field.space.heads), 7), field.space.select())
    bound = step_bound(MODEL, field.job.platform, TRAIN, field.space.table(places))
    assert (field.bound[places // len(field.space.tails)] <= bound * (1 + 1e-12)).all()


def test_no_floor_of_a_head_exceeds_those_of_its_branches_nor_theirs_a_peak():
    field = Field.of(Job(MODEL, machine(ranks=8, compute_slots=8), TRAIN, 8, 2**40))
    space, peaks, everything = field.space, field.peaks, field.space.select()
    heads = np.arange(3, len(space.heads), len(space.heads) // 40)
    branches, _ = space.branches(heads, everything)
    places = space.places_of(branches[::5], everything)[::3]
    of_branches, of_places = peaks.branch_floors(branches), peaks.floors(places)
    assert (peaks.head_floors(branches * space.tails_of_branch // len(space.tails)) <= of_branches).all()
    assert (peaks.branch_floors(places // space.tails_of_branch) <= of_places).all()
    assert (of_places <= peak_bytes(MODEL, TRAIN, space.table(places))).all()


def test_the_branches_of_a_head_end_in_its_strategies():
    space = job_space(Job(MODEL, machine(ranks=8, compute_slots=3), TRAIN, 8, 2**40))
    part = space.select(zero_dense=[0, 1], dispatcher=0)
    heads = np.arange(0, len(space.heads), 5)
    branches, strategies = space.branches(heads, part)
    places = space.places_of(branches, part)
    assert places.tolist() == space.places(heads, part).tolist()
    assert np.unique(places // space.tails_of_branch, return_counts=True)[1].tolist() == strategies.tolist()
    table, of_branch = space.table(places), space.table(branches * space.tails_of_branch)
    for name in ("recompute", "recompute_modules"):
        assert (getattr(table, name) == np.repeat(getattr(of_branch, name), strategies)).all()


def test_redundant_strategies_cost_what_the_kept_ones_cost():
    job = Job(MODEL, machine(), TRAIN, 4, 2**40)
    space = job_space(job)
    part = space.select(**PART)
    heads = np.flatnonzero(part.heads)
    kept = space.places(heads, part)
    every = (heads[:, None] * len(space.tails) + np.flatnonzero(part.tails)).ravel()
    dropped = np.setdiff1d(every, kept)
    dropped = dropped[legal_mask(space.table(dropped), MODEL, TRAIN, 4, LEGAL)]
    assert len(dropped)
    to_the_nanosecond = [
        set(np.round(simulated_seconds(job, space.table(places)), 9).tolist()) for places in (dropped, kept)
    ]
    assert to_the_nanosecond[0] <= to_the_nanosecond[1]


def test_a_plan_survives_its_file_and_names_the_source_of_every_input(tmp_path):
    result = find_plan(MODEL, machine(), TRAIN, world_size=4, memory_budget_bytes=64 * MIB)
    assert load(save(tmp_path / "plan.toml", result.plan), Plan) == result.plan
    assert result.plan.strategy == result.chosen.strategy
    assert result.plan.prediction == predict(MODEL, machine(), TRAIN, result.chosen.strategy)
    assert result.plan.inputs["memory_budget_bytes"].source == "given for this plan"
    assert all(entry.source for entry in result.plan.inputs.values())


def test_the_budget_defaults_to_the_platforms_memory_less_what_is_reserved():
    platform = machine(memory_bytes=2**30).model_copy(update={"reserved_bytes": 2**20})
    assert find_plan(MODEL, platform, TRAIN, world_size=4).memory_budget_bytes == 2**30 - 2**20


def test_when_nothing_fits_the_closest_strategy_and_its_lack_are_named():
    with pytest.raises(NoPlanFits) as caught:
        find_plan(MODEL, machine(), TRAIN, world_size=4, memory_budget_bytes=MIB, headroom=0)
    space = job_space(Job(MODEL, machine(), TRAIN, 4, MIB))
    table = space.table(space.places(np.arange(len(space.heads)), space.select()))
    peaks = peak_bytes(MODEL, TRAIN, table)
    closest, *ways = str(caught.value).splitlines()
    assert f"fits 1.00 MiB per rank; the closest, {strategy_text(table.row(int(peaks.argmin())))}" in closest
    assert f"misses {format_bytes(peaks.min() - MIB)} on rank" in closest
    needed = -(-int(peaks.min()) // MIB)
    assert ways[0].startswith(f"--memory {needed}MiB: ")
    assert find_plan(MODEL, machine(), TRAIN, world_size=4, memory_budget_bytes=needed * MIB, headroom=0).ranked


def test_of_steps_that_only_rounding_tells_apart_the_plainest_schedule_is_chosen():
    field = Field.of(Job(MODEL, machine(), TRAIN, 4, 2**40))
    overlapped = [SCHEDULE_NAMES.index(name) for name in ("1f1b-overlap", "interleaved-1f1b-overlap")]
    chosen, other = field.best(2, field.space.select(pipeline_parallel=1, schedule=overlapped)).best
    assert field.space.strategy(chosen.place).schedule == "1f1b-overlap"
    assert other.seconds == pytest.approx(chosen.seconds, rel=1e-9)


def test_what_fits_without_the_headroom_is_said_to():
    [smallest] = peak_bytes(MODEL, TRAIN, StrategyTable.of([Strategy.parse("pp1 dp1 ep1 mbs1 1f1b z0 full")]))
    budget = math.ceil(smallest)
    with pytest.raises(NoPlanFits, match="--headroom 0: pp1 dp1 ep1 mbs1 1f1b z0 full, "):
        find_plan(MODEL, machine(), TRAIN, world_size=1, memory_budget_bytes=budget)
    assert find_plan(MODEL, machine(), TRAIN, world_size=1, memory_budget_bytes=budget, headroom=0).ranked


@pytest.mark.slow
def test_the_memory_that_would_be_enough_leaves_its_headroom():
    with pytest.raises(NoPlanFits) as caught:
        find_plan(MODEL, machine(), TRAIN, world_size=4, memory_budget_bytes=MIB, headroom=0.25)
    closest, way, *_ = str(caught.value).splitlines()
    assert "fits 768.00 KiB per rank (1.00 MiB less --headroom 25)" in closest
    needed = int(way.removeprefix("--memory ").split("MiB")[0])
    assert find_plan(MODEL, machine(), TRAIN, world_size=4, memory_budget_bytes=needed * MIB, headroom=0.25).ranked


@pytest.mark.slow
def test_every_relaxation_is_enough_and_costs_what_it_says():
    budget = 2 * MIB
    with pytest.raises(NoPlanFits) as caught:
        find_plan(MODEL, machine(ranks=16), TRAIN, world_size=4, memory_budget_bytes=budget)
    ways = dict(line.split(": ", 1) for line in str(caught.value).splitlines()[1:])
    [ranks] = [int(way.removeprefix("--ranks ")) for way in ways if way.startswith("--ranks")]
    relaxed = find_plan(MODEL, machine(ranks=16), TRAIN, world_size=ranks, memory_budget_bytes=budget)
    assert f"{format_seconds(relaxed.chosen.step_seconds)} a step" in ways[f"--ranks {ranks}"]
    with pytest.raises(NoPlanFits):
        find_plan(MODEL, machine(ranks=16), TRAIN, world_size=ranks // 2, memory_budget_bytes=budget)


@pytest.mark.slow
def test_the_most_memory_to_spare_costs_at_most_five_per_cent():
    train = TRAIN.model_copy(update={"global_batch_size": 4})
    fastest = find_plan(MODEL, machine(), train, world_size=4).chosen
    frugal = find_plan(MODEL, machine(), train, world_size=4, objective="memory").chosen
    assert frugal.peak_bytes <= fastest.peak_bytes
    job = Job(MODEL, machine(), train, 4, machine().memory_budget_bytes)
    space = job_space(job)
    table = space.table(space.places(np.arange(len(space.heads)), space.select()))
    near = simulated_seconds(job, table) <= 1.05 * fastest.step_seconds
    least = peak_bytes(MODEL, train, table.take(near)).min()
    assert least <= frugal.peak_bytes
    assert frugal.step_seconds <= 1.05 * fastest.step_seconds


def test_a_number_of_ranks_without_a_legal_arrangement_names_legal_ones_nearby():
    with pytest.raises(UserError) as caught:
        find_plan(MODEL, machine(ranks=16), TRAIN, world_size=7)
    assert str(caught.value).startswith("ranks = 7: no arrangement is legal for small")
    assert str(caught.value).endswith("nearest: 4, 5, 6, 8")


@pytest.mark.parametrize(
    ("ranks", "line"),
    [
        (0, "ranks = 0: platform machine describes 1 to 4 ranks"),
        (8, "ranks = 8: platform machine describes 1 to 4 ranks"),
    ],
)
def test_a_number_of_ranks_that_the_platform_does_not_have_is_refused(ranks, line):
    with pytest.raises(UserError, match=line):
        find_plan(MODEL, machine(), TRAIN, world_size=ranks)

import numpy as np
import pytest
from tests.resources.cases import MODEL, TRAIN, machine

from pipermoe.planner import find_plan
from pipermoe.planner.search import Field, Job, exact_seconds, head_bounds
from pipermoe.planner.space import Space, job_space
from pipermoe.resources.evaluate import peak_bytes, step_bound
from pipermoe.resources.step import predict
from pipermoe.specs.documents import load, save
from pipermoe.specs.errors import NoPlanFits, UserError
from pipermoe.specs.plan import Plan
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import format_bytes, format_seconds

MIB = 2**20


def every_place(space: Space) -> np.ndarray:
    return space.places(np.arange(len(space.heads)), space.select())


@pytest.mark.parametrize(("slots", "budget"), [(2, 9 * MIB), (4, 100 * MIB)])
def test_the_ranking_is_that_of_simulating_every_strategy(slots, budget):
    platform = machine(ranks=4, compute_slots=slots)
    result = find_plan(MODEL, platform, TRAIN, world_size=4, memory_budget_bytes=budget, top=5)
    space = job_space(MODEL, TRAIN, 4)
    reports = [predict(MODEL, platform, TRAIN, space.strategy(place)) for place in every_place(space)]
    fitting = [report.step_seconds for report in reports if max(r.peak_bytes for r in report.ranks) <= budget]
    assert [row.step_seconds for row in result.ranked] == sorted(fitting)[:5]


def test_the_search_simulates_only_a_part_and_accounts_for_every_strategy():
    counts = find_plan(MODEL, machine(), TRAIN, world_size=4, top=3).counts
    assert counts is not None
    assert counts.considered == (
        counts.illegal + counts.redundant + counts.not_fitting + counts.pruned + counts.simulated
    )
    assert 3 <= counts.simulated < counts.simulated + counts.pruned


def test_the_best_with_a_given_value_is_the_fastest_of_those_that_have_it():
    field = Field.of(Job(MODEL, machine(), TRAIN, 4, 9 * MIB))
    selection = field.space.select(recompute=2, expert_parallel=[2, 4])
    [best] = field.best(1, selection).best
    ranking = field.best(len(every_place(field.space))).best
    chosen = (field.space.strategy(found.place) for found in ranking)
    first = next(s for s in chosen if s.recompute == "full" and s.expert_parallel > 1)
    assert field.space.strategy(best.place) == first
    assert field.bound[field.promising(selection) // len(field.space.tails)] <= best.seconds


def test_every_bound_of_a_space_is_below_its_simulation():
    job = Job(MODEL, machine(ranks=8, compute_slots=3), TRAIN, 8, 2**40)
    space = job_space(MODEL, TRAIN, 8)
    table = space.table(every_place(space))
    exact = np.array([exact_seconds(job, table.row(row)) for row in range(len(table))])
    bound = step_bound(MODEL, job.platform, TRAIN, table)
    assert (bound <= exact * (1 + 1e-12)).all()
    assert (head_bounds(job, space)[every_place(space) // len(space.tails)] <= bound * (1 + 1e-12)).all()


def test_redundant_strategies_cost_what_the_kept_ones_cost():
    space = job_space(MODEL, TRAIN, 4)
    kept = every_place(space)
    dropped = np.setdiff1d(np.arange(len(space.heads) * len(space.tails)), kept)
    assert len(dropped) == space.redundant(space.select())
    assert _distinct_seconds(space, dropped) <= _distinct_seconds(space, kept)


def _distinct_seconds(space: Space, places: np.ndarray) -> set[float]:
    """To the nanosecond: sums in another order differ in their last digits."""
    job = Job(MODEL, machine(), TRAIN, 4, 2**40)
    return {round(exact_seconds(job, space.strategy(place)), 9) for place in places}


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
        find_plan(MODEL, machine(), TRAIN, world_size=4, memory_budget_bytes=MIB)
    space = job_space(MODEL, TRAIN, 4)
    table = space.table(every_place(space))
    peaks = peak_bytes(MODEL, TRAIN, table)
    closest, *ways = str(caught.value).splitlines()
    assert f"fits 1.00 MiB per rank; the closest, {strategy_text(table.row(int(peaks.argmin())))}" in closest
    assert f"misses {format_bytes(peaks.min() - MIB)} on rank" in closest
    needed = -(-int(peaks.min()) // MIB)
    assert ways[0].startswith(f"--memory {needed}MiB: ")
    assert find_plan(MODEL, machine(), TRAIN, world_size=4, memory_budget_bytes=needed * MIB).ranked


def test_every_relaxation_is_enough_and_costs_what_it_says():
    budget = 2 * MIB
    with pytest.raises(NoPlanFits) as caught:
        find_plan(MODEL, machine(ranks=16), TRAIN, world_size=4, memory_budget_bytes=budget)
    ways = dict(line.split(": ", 1) for line in str(caught.value).splitlines()[1:])
    [gpus] = [int(way.removeprefix("--gpus ")) for way in ways if way.startswith("--gpus")]
    relaxed = find_plan(MODEL, machine(ranks=16), TRAIN, world_size=gpus, memory_budget_bytes=budget)
    assert f"{format_seconds(relaxed.chosen.step_seconds)} a step" in ways[f"--gpus {gpus}"]
    with pytest.raises(NoPlanFits):
        find_plan(MODEL, machine(ranks=16), TRAIN, world_size=gpus // 2, memory_budget_bytes=budget)


def test_the_most_memory_to_spare_costs_at_most_five_per_cent():
    train = TRAIN.model_copy(update={"global_batch_size": 4})
    fastest = find_plan(MODEL, machine(), train, world_size=4).chosen
    frugal = find_plan(MODEL, machine(), train, world_size=4, objective="memory").chosen
    assert frugal.peak_bytes <= fastest.peak_bytes
    space = job_space(MODEL, train, 4)
    reports = [predict(MODEL, machine(), train, space.strategy(place)) for place in every_place(space)]
    near = [report for report in reports if report.step_seconds <= 1.05 * fastest.step_seconds]
    assert frugal.peak_bytes == min(max(rank.peak_bytes for rank in report.ranks) for report in near)


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

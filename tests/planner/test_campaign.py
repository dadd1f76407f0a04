"""A whole run: its days, its cost, and the fewest ranks that reach a target."""

from dataclasses import replace

import pytest
from tests.resources.cases import MODEL, TRAIN, machine

from pipermoe.planner import find_plan
from pipermoe.planner.campaign import (
    Goal,
    best_by_size,
    campaign,
    fewest_device_hours,
    fewest_ranks,
    parse_target,
    parse_tokens,
    sizes,
)
from pipermoe.planner.job import Job
from pipermoe.resources.goodput import Reliability, checkpoint_interval, goodput
from pipermoe.specs.errors import NoPlanFits, UserError

JOB = Job(MODEL, machine(ranks=4), TRAIN, 4, 2**30)
WIDE = Job(MODEL, machine(ranks=8), TRAIN, 8, 2**30)


def test_targets_are_read_as_people_write_them():
    assert parse_target("100B tokens in 3 days") == (100e9, 3 * 86_400)
    assert parse_target("1.5T tokens in 2 weeks") == (1.5e12, 1_209_600)
    assert parse_tokens("15T") == 15e12


@pytest.mark.parametrize(
    "text", ["100B tokens", "100B tokens in three days", "-1B tokens in 3 days", "0 tokens in 1 day"]
)
def test_a_target_that_says_something_else_is_refused(text):
    with pytest.raises(UserError, match="--t"):
        parse_target(text)


def test_the_interval_of_young_is_the_best_one():
    best = checkpoint_interval(60.0, 36_000.0)
    lost = {tau: 60.0 / tau + tau / 2 / 36_000.0 for tau in (best / 1.1, best, best * 1.1)}
    assert min(lost, key=lost.__getitem__) == best
    assert goodput(60.0, 36_000.0, 0.0) == pytest.approx(1 / (1 + lost[best]))
    assert goodput(0.0, 1e12, 600.0) == pytest.approx(1.0)


def test_a_run_takes_its_tokens_over_its_speed_and_its_progress():
    chosen = find_plan(MODEL, machine(), TRAIN, world_size=4).chosen
    unreliable = Reliability(device_mtbf_seconds=40_000.0, checkpoint_bytes_per_s=1e6, restart_seconds=100.0)
    run = campaign(JOB, chosen, Goal(tokens=1e9, price=2.0, reliability=unreliable))
    assert run.seconds * run.goodput * chosen.tokens_per_second == pytest.approx(1e9)
    assert run.failures == pytest.approx(run.seconds / 10_000)
    assert run.cost == pytest.approx(2 * run.device_hours) == pytest.approx(run.seconds * 4 / 3600 * 2)
    assert run.goodput < campaign(JOB, chosen, Goal(tokens=1e9)).goodput


def test_the_fewest_ranks_are_the_first_size_that_is_fast_enough():
    runs = {job.world_size: campaign(job, best, Goal(tokens=1e9)).seconds for job, best in best_by_size(WIDE)}
    assert list(runs) == [1, 2, 3, 4, 6, 8]
    fast = min(runs.values())
    expected = next(size for size, seconds in runs.items() if seconds <= 1.2 * fast)
    assert fewest_ranks(WIDE, Goal(tokens=1e9, seconds=1.2 * fast)) == expected
    with pytest.raises(NoPlanFits, match=r"trains 1 G tokens in .* days; the nearest takes at least"):
        fewest_ranks(WIDE, Goal(tokens=1e9, seconds=0.5 * fast))
    with pytest.raises(NoPlanFits, match="no number of ranks of machine holds"):
        fewest_ranks(replace(WIDE, memory_bytes=2**16), Goal(tokens=1e9, seconds=100 * max(runs.values())))
    hours = {size: size * seconds for size, seconds in runs.items() if size <= 4}
    assert fewest_device_hours(replace(WIDE, world_size=4), Goal(tokens=1e9)) == min(hours, key=hours.__getitem__)


def test_sizes_fill_hosts_and_end_with_the_machine():
    host = JOB.platform.host.model_copy(update={"ranks": 2})
    assert list(sizes(replace(JOB, platform=JOB.platform.model_copy(update={"host": host})))) == [1, 2, 4]

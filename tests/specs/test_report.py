"""A report in a file: ranks that are alike are told once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.plans import tiny_plan

from pipermoe.specs.documents import MAX_DOCUMENT_BYTES, load, save, to_toml
from pipermoe.specs.errors import UserError
from pipermoe.specs.plan import Plan
from pipermoe.specs.report import StepReport
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.units import format_ranges, parse_ranges


def test_a_plan_of_65536_ranks_is_a_small_file(tmp_path):
    plan = tiny_plan(Strategy.parse("pp16 dp4096 ep256 mbs1 1f1b z1"))
    path = save(tmp_path / "plan.toml", plan)
    assert path.stat().st_size < MAX_DOCUMENT_BYTES / 1000
    assert load(path, Plan) == plan


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_ranks_keep_their_order_and_their_own_figures(peaks):
    rank = tiny_plan(Strategy()).prediction.ranks[0]
    ranks = tuple(rank.model_copy(update={"rank": n, "peak_bytes": peak}) for n, peak in enumerate(peaks))
    report = StepReport(step_seconds=1.0, ranks=ranks)
    assert StepReport.model_validate(report.model_dump()) == report
    assert len(report.model_dump()["ranks"]) == len(set(peaks))


@given(st.sets(st.integers(0, 40), min_size=1))
def test_a_list_of_numbers_is_read_back(numbers):
    assert parse_ranges(format_ranges(sorted(numbers)), limit=41) == sorted(numbers)


@pytest.mark.parametrize("text", ["0-99999999", "5-3", "0-", "one", "0-1,,2", "999999999"])
def test_a_list_that_names_no_ranks_is_refused(text, tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(to_toml(tiny_plan(Strategy.parse("pp1 dp2 ep2"))).replace('rank = "0-1"', f'rank = "{text}"'))
    with pytest.raises(UserError, match=r"plan.toml: prediction.ranks = .* must be runs of numbers below 1,048,576"):
        load(path, Plan)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("rank = 0", "", r"plan.toml: prediction.ranks.1.rank: required key is missing"),
        ('rank = "0-1"', 'rank = "1-2"', r"plan.toml: prediction.ranks = .* must name every rank once, from 0 on"),
        ("rank = 0", "rank = 2", r"plan.toml: prediction.ranks = .* must name every rank once, from 0 on"),
    ],
    ids=["no number", "a rank twice", "a rank left out"],
)
def test_a_file_names_every_rank_once(first, second, message, tmp_path):
    plan = tiny_plan(Strategy.parse("pp1 dp2 ep2"))
    ranks = [rank.model_copy(update={"flops": rank.rank}) for rank in plan.prediction.ranks]
    text = to_toml(plan.model_copy(update={"prediction": plan.prediction.model_copy(update={"ranks": tuple(ranks)})}))
    path = tmp_path / "plan.toml"
    path.write_text(text.replace("rank = 0", first).replace("rank = 1", second))
    with pytest.raises(UserError, match=message):
        load(path, Plan)

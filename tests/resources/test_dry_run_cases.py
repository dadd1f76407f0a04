"""What the resource model says of FLOPs, parameters and traffic is what a dry run counts, to the unit; its peak memory
is within -1 and +2 % of it."""

from __future__ import annotations

import pytest
from tests.resources.case_list import FAMILIES, SCHEDULES, Case, cases
from tests.resources.compared import compare

FAST = (0, 12, 24)  # positions in the list; all of it runs with the slow tests
CASES = [pytest.param(case, id=str(case), marks=[pytest.mark.slow] * (i not in FAST)) for i, case in enumerate(cases())]


@pytest.mark.parametrize("case", CASES)
def test_the_model_equals_the_dry_run(case: Case):
    found = compare(case)
    assert found.equal
    assert -0.01 <= found.peak_error <= 0.02


def test_the_list_has_every_family_and_schedule_and_no_case_twice():
    assert len(set(map(str, cases()))) == len(cases()) >= 60
    assert {case.model.name for case in cases()} == set(FAMILIES)
    assert {case.strategy.schedule for case in cases()} == set(SCHEDULES)

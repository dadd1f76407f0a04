"""What the resource model says of FLOPs, parameters and traffic is what a dry run counts, to the unit; its peak memory
is within -1 and +2 % of it."""

from __future__ import annotations

import pytest
from tests.resources.case_list import FAMILIES, SCHEDULES, Case, cases
from tests.resources.compared import compare

from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

FAST = (0, 12, 24)  # positions in the list; all of it runs with the slow tests
CASES = [pytest.param(case, id=str(case), marks=[pytest.mark.slow] * (i not in FAST)) for i, case in enumerate(cases())]


@pytest.mark.parametrize("case", CASES)
def test_the_model_equals_the_dry_run(case: Case):
    found = compare(case)
    assert found.equal
    assert -0.01 <= found.peak_error <= 0.02


@pytest.mark.parametrize(
    ("strategy", "mtp_layers"),
    [
        ("pp2 dp2 ep2 mbs1 1f1b z3", 0),
        pytest.param("pp1 dp2 ep2 mbs1 1f1b z2", 1, marks=pytest.mark.slow),
        pytest.param("pp1 dp2 ep2 mbs1 1f1b z3", 0, marks=pytest.mark.slow),
        pytest.param("pp2 vpp2 dp2 ep2 mbs1 zb-v z3", 1, marks=pytest.mark.slow),
        pytest.param("pp2 vpp2 dp2 ep2 mbs1 dualpipe-v z3", 0, marks=pytest.mark.slow),
    ],
)
def test_a_tied_head_brings_the_embedding_wherever_it_is_sharded(strategy, mtp_layers):
    update = {"tie_word_embeddings": True, "mtp_layers": mtp_layers, "num_layers": 4}
    model = FAMILIES["plain"].model_copy(update=update)
    found = compare(Case(model, TrainConfig(seq_len=128, global_batch_size=8), Strategy.parse(strategy)))
    assert found.equal
    assert -0.01 <= found.peak_error <= 0.02


def test_the_list_has_every_family_and_schedule_and_no_case_twice():
    assert len(set(map(str, cases()))) == len(cases()) >= 60
    assert {case.model.name for case in cases()} == set(FAMILIES)
    assert {case.strategy.schedule for case in cases()} == set(SCHEDULES)

"""Spare slots and copies weigh in the model what they weigh in a dry run."""

from __future__ import annotations

import pytest
from tests.runtime.tiny import MODELS, TRAIN

from pipermoe.dryrun.dry_run import dry_run
from pipermoe.resources.peak import peak_bytes
from pipermoe.resources.step import predict
from pipermoe.specs.platform_file import load_platform
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import Balance

BALANCES = {
    "bound": Balance(policy="balanced", mechanism="bound", spare_slots=1),
    "decoupled": Balance(policy="balanced", mechanism="decoupled", spare_slots=1),
    "sparse": Balance(policy="balanced", mechanism="sparse", spare_slots=1),
    "spill": Balance(spill_above=1.1),
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, "pp1 dp4 ep4") for name in BALANCES),
        ("bound", "pp2 dp4 ep2 edp2 z1/0 1f1b"),
        ("decoupled", "pp2 dp4 ep2 edp2 z1 1f1b"),
        ("sparse", "pp2 dp4 ep2 edp2 z1 1f1b"),
        ("spill", "pp2 dp4 ep2 edp2 z3 1f1b"),
    ],
)
def test_states_are_those_of_the_dry_run_to_the_byte_and_the_peak_is_near(name, text):
    job, strategy = TRAIN.model_copy(update={"balance": BALANCES[name]}), Strategy.parse(text)
    predicted = predict(MODELS["rich"], load_platform("laptop"), job, strategy).ranks[0].memory_bytes
    counted = dry_run(MODELS["rich"], job, strategy, rank=0).report.memory_bytes
    for category in ("weights", "gradients", "optimizer"):
        assert predicted[category] == counted[category], category
    assert 0.96 <= sum(predicted.values()) / sum(counted.values()) <= 1.2


def test_a_search_weighs_them_as_well():
    table = StrategyTable.of([Strategy.parse("pp1 dp4 ep4")])
    still, moving = (
        peak_bytes(MODELS["rich"], TRAIN.model_copy(update={"balance": balance}), table)[0]
        for balance in (Balance(), BALANCES["bound"])
    )
    experts = 3 * 3 * 16 * 12  # one spare slot in each of three layers: three matrices of hidden times width
    assert moving - still == 16 * experts

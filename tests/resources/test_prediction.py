"""Multi-token prediction in the resource model: what it adds to the last stage is what the dry run counts there."""

from __future__ import annotations

import numpy as np
import pytest
from tests.resources.cases import machine
from tests.resources.memory_cases import MODELS

from pipermoe.dryrun.dry_run import dry_run
from pipermoe.resources.bound import step_bound
from pipermoe.resources.peak import peak_bytes
from pipermoe.resources.step import predict
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig

CASES = [
    ("latent", 1, "pp2 dp2 ep2 mbs1 1f1b z1"),
    ("shared", 2, "pp1 dp2 ep2 gpipe z0"),
    ("latent", 2, "pp2 dp2 ep2 1f1b full z1"),
    ("dense-first", 1, "pp2 dp2 ep1 zb-h1 z1"),
    ("shared", 2, "pp2 vpp2 dp2 ep2 zb-v z2"),
    ("shared", 2, "pp2 dp2 ep1 1f1b z3"),
]


@pytest.mark.parametrize(
    ("name", "depths", "text"), [*CASES[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[2:])]
)
def test_flops_and_traffic_are_the_dry_runs_and_memory_is_within_a_percent(name, depths, text):
    strategy = Strategy.parse(text)
    model = MODELS[name].model_copy(update={"mtp_layers": depths})
    train = TrainConfig(seq_len=64, global_batch_size=4 * strategy.data_parallel * strategy.micro_batch_size)
    predicted = predict(model, machine(strategy.world_size), train, strategy)
    for rank in range(0, strategy.world_size, strategy.ranks_per_stage):
        expected, counted = predicted.ranks[rank], dry_run(model, train, strategy, rank=rank).report
        exchanged = {key: sent for key, sent in expected.traffic.items() if not key.startswith("all_to_all_counts")}
        assert counted.flops == expected.flops
        assert counted.traffic == exchanged
        assert counted.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.012)


@pytest.mark.parametrize(("name", "depths", "text"), CASES)
def test_a_strategy_among_many_weighs_the_same_and_its_bound_holds(name, depths, text):
    strategy = Strategy.parse(text)
    model, platform = MODELS[name].model_copy(update={"mtp_layers": depths}), machine(strategy.world_size)
    train = TrainConfig(seq_len=64, global_batch_size=4 * strategy.data_parallel * strategy.micro_batch_size)
    table, predicted = StrategyTable.of([strategy]), predict(model, platform, train, strategy)
    assert peak_bytes(model, train, table)[0] == max(rank.peak_bytes for rank in predicted.ranks)
    assert 0 < step_bound(model, platform, train, table)[0] <= predicted.step_seconds * (1 + 1e-9)


def test_full_experts_cost_no_more_however_uneven_the_routing():
    model, strategy = MODELS["shared"], Strategy.parse("pp1 dp4 ep4 mbs1 1f1b")

    def cost(imbalance: float, capacity_factor: float = 0.0) -> tuple[float, int]:
        train = TrainConfig(seq_len=64, global_batch_size=8, capacity_factor=capacity_factor)
        found = predict(model, machine(), train, strategy, imbalance)
        return found.step_seconds, found.ranks[0].peak_bytes

    full, uneven, without = cost(1.25, 1.25), cost(3.0, 1.25), cost(3.0)
    assert full == uneven
    assert uneven[0] < without[0]
    assert uneven[1] < without[1]
    assert cost(1.0, 1.25)[0] < full[0]


def test_only_the_last_stage_gets_slower():
    strategy, model = Strategy.parse("pp2 dp2 ep2 1f1b z1"), MODELS["latent"]
    train = TrainConfig(seq_len=64, global_batch_size=16)
    plain, predicting = (
        predict(each, machine(4), train, strategy) for each in (model, model.model_copy(update={"mtp_layers": 1}))
    )
    added = [after.flops - before.flops for before, after in zip(plain.ranks, predicting.ranks, strict=True)]
    assert added[:2] == [0, 0]
    assert added[2] == added[3] > 0
    assert predicting.step_seconds > plain.step_seconds
    computing = [each.seconds["forward"] + each.seconds["backward"] for each in predicting.ranks]
    assert np.argmax(computing) in (2, 3)


def test_a_tied_head_on_another_stage_reduces_its_copy_with_the_first():
    strategy, train = Strategy.parse("pp2 dp2 ep2 1f1b z1"), TrainConfig(seq_len=64, global_batch_size=16)
    model = MODELS["shared"].model_copy(update={"tie_word_embeddings": True})
    predicted = predict(model, machine(4), train, strategy)
    for rank in (0, 2):
        counted = dry_run(model, train, strategy, rank=rank).report.traffic
        assert counted["all_reduce.ends"] == predicted.ranks[rank].traffic["all_reduce.ends"]
        assert counted["all_reduce.ends"].bytes == model.vocab_size * model.hidden_size // 2 * 4

"""Layout policies on a plan: slower where ranks are uneven, dearer where copies move, larger where they stay."""

import numpy as np
import pytest
from tests.resources.cases import MODEL, TRAIN, machine

from pipermoe.layout.policies import POLICIES
from pipermoe.layout.replay import compare_policies
from pipermoe.layout.trace import Trace
from pipermoe.resources.peak import peak_bytes
from pipermoe.resources.relayout import price_policies
from pipermoe.resources.step import predict
from pipermoe.specs.plan import Plan
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable

STRATEGY = Strategy(data_parallel=2, expert_parallel=2)
EXPERT = 3 * 64 * 96  # parameters


def test_a_policy_costs_what_its_imbalance_its_moves_and_its_copies_cost():
    trace = Trace("random", np.random.default_rng(0).integers(1, 40, (8, 1, 8)))
    chosen = {name: POLICIES[name] for name in ("static", "swaps", "balanced")}
    found = compare_policies(trace, chosen, ranks=2, nodes=1, slots=5, every=1, window=1)
    platform = machine(2)
    plan = Plan(
        name="small",
        platform="machine",
        memory_budget_bytes=2**30,
        model=MODEL,
        train=TRAIN,
        strategy=STRATEGY,
        prediction=predict(MODEL, platform, TRAIN, STRATEGY),
    )
    priced = price_policies(found, plan, platform)
    static, swaps, balanced = priced.prices
    assert priced.balanced_seconds == plan.prediction.step_seconds
    for price, replayed in zip(priced.prices, found.policies, strict=True):
        assert price.step_seconds == predict(MODEL, platform, TRAIN, STRATEGY, replayed.met).step_seconds
    table = StrategyTable.of([STRATEGY])
    assert static.move_seconds_per_step == 0
    assert static.peak_bytes == peak_bytes(MODEL, TRAIN, table, imbalance=found.policies[0].p95)[0]
    # A link of 2 ms and 0.5 GB/s, 5 MoE layers; every plan sends an expert's 16 bytes a parameter for each arrival.
    assert found.policies[1].arrivals > 0
    sent = found.policies[1].arrivals * 5 * 16 * EXPERT
    assert swaps.move_seconds_per_step == pytest.approx(2e-3 + sent / 0.5e9)
    # A fifth expert on a rank: its weights and gradients, 4 bytes each, in 5 layers.
    extra = balanced.peak_bytes - peak_bytes(MODEL, TRAIN, table, imbalance=found.policies[2].p95)[0]
    assert extra == 8 * EXPERT * 5 * (found.policies[2].held - 4)
    assert found.policies[2].held == 5

"""A dry run of any rank, in one process, reports what that rank measures in a real run under the same routing."""

from __future__ import annotations

import pytest
import torch
from tests.distributed.harness import run_ranks
from tests.runtime.tiny import MODELS, TRAIN, batch_for

from pipermoe.dryrun.dry_run import dry_run, move_to_planned_layout
from pipermoe.dryrun.planned_routing import planned_counts
from pipermoe.layout.policy import Nodes
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.layout.lay_out import laid_out_in_order
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.runtime.step import training_step
from pipermoe.schedule.builders import schedule_of
from pipermoe.schedule.communication import with_communication
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import Balance, TrainConfig
from pipermoe.training.counting import counted

pytestmark = pytest.mark.distributed

slow = pytest.mark.slow
CASES = [
    pytest.param("plain", "pp2 dp2 ep2 z1 1f1b", "lognormal:max=1.8"),
    pytest.param("rich", "pp2 vpp2 dp2 ep2 z0/1 interleaved-1f1b full", "balanced"),
    pytest.param("rich", "pp2 dp2 ep2 dualpipe z1/3", "lognormal:sigma=0.5"),
    pytest.param("latent", "pp4 dp1 ep1 dualpipe z2 full", "balanced", marks=slow),
    pytest.param("sigmoid", "pp4 dp1 ep1 zb-h1 split:1,1,1,1", "balanced", marks=slow),
    pytest.param("rich", "pp2 dp2 ep1 z1 mbs2 gpipe split:1,3", "lognormal:sigma=1", marks=slow),
    pytest.param("sigmoid", "pp1 dp4 ep4 z1/0 mbs2 full", "lognormal:max=2", marks=slow),
    pytest.param("plain", "pp2 vpp2 dp2 ep2 zb-v z1", "lognormal:max=1.5", marks=slow),
    pytest.param("rich", "pp1 dp4 ep2 z1", "lognormal:sigma=0.5", marks=slow),
    pytest.param("plain", "pp4 vpp1 dp1 ep1 zb-h2", "balanced", marks=slow),
    pytest.param("latent", "pp2 dp2 ep2 1f1b deduplicated", "lognormal:sigma=1", marks=slow),
    pytest.param("rich", "pp1 dp4 ep4 deduplicated:2", "lognormal:sigma=1", marks=slow),
    pytest.param("grouped", "pp2 dp2 ep2 1f1b-overlap", "lognormal:max=1.5", marks=slow),
    pytest.param("older", "pp1 dp4 ep2 edp2 z2", "balanced", marks=slow),
    pytest.param("sinks", "pp2 dp2 ep1 edp2 z3 1f1b", "balanced", marks=slow),
    pytest.param("rich", "pp2 vpp2 dp2 ep2 dualpipe-v z1", "lognormal:sigma=0.5", marks=slow),
    pytest.param("latent", "pp1 dp4 ep4 z3 deduplicated full", "lognormal:max=2", marks=slow),
    pytest.param("tied", "pp2 vpp2 dp2 ep2 v-half z1", "balanced", marks=slow),
    pytest.param("rich", "pp2 dp2 ep2 zb-h1 selective:norm", "lognormal:sigma=1", marks=slow),
    pytest.param("grouped", "pp1 dp4 ep2 edp2 z2/3 selective:experts", "lognormal:sigma=0.5", marks=slow),
    pytest.param("sinks", "pp4 dp1 ep1 1f1b-overlap full", "balanced", marks=slow),
    pytest.param("plain", "pp2 vpp2 dp2 ep1 edp2 zb-v-overlap z2", "balanced", marks=slow),
    pytest.param("older", "pp2 vpp2 dp2 ep2 breadth-first deduplicated", "lognormal:max=1.8", marks=slow),
    pytest.param("sigmoid", "pp4 dp1 ep1 gpipe selective:attention", "balanced", marks=slow),
]


BALANCES = {
    "bound": Balance(policy="balanced", mechanism="bound", spare_slots=1),
    "decoupled": Balance(policy="balanced", mechanism="decoupled", spare_slots=1),
    "sparse": Balance(policy="balanced", mechanism="sparse", spare_slots=1),
    "spill": Balance(spill_above=1.0),
}
BALANCED_CASES = [
    pytest.param("decoupled", "pp2 dp2 ep2 z1 1f1b"),
    pytest.param("bound", "pp1 dp4 ep4", marks=slow),
    pytest.param("decoupled", "pp1 dp4 ep2 edp2 z1 full", marks=slow),
    pytest.param("sparse", "pp1 dp4 ep4 z1/0", marks=slow),
    pytest.param("spill", "pp2 dp2 ep2 zb-h1", marks=slow),
    pytest.param("spill", "pp1 dp4 ep4 z3 full", marks=slow),
]


def measure(rank: int, model_name: str, strategy: Strategy, routing: str, train: TrainConfig = TRAIN) -> dict:
    """What one rank of a real run counts in its second step."""
    model, moe = MODELS[model_name], MODELS[model_name].moe
    tokens = strategy.micro_batch_size * TRAIN.seq_len
    counts = planned_counts(
        routing, tokens=tokens, top_k=moe.top_k, experts=moe.num_experts, sources=strategy.expert_parallel
    )
    groups = ProcessGroups.create(strategy)
    schedule = with_communication(schedule_of(strategy, TRAIN.global_batch_size))
    laid_out = laid_out_in_order(model, train, Nodes(groups.ep.size(), groups.ep.size()))
    engine = Engine(model, train, strategy, schedule, groups, planned_counts=counts.tolist(), laid_out=laid_out)
    optimizer = Optimizer(engine.flats, train.optimizer)
    move_to_planned_layout(engine, optimizer, counts.sum(0))
    batch = batch_for(strategy, groups.coordinates.dp, 0)

    def agree(totals: torch.Tensor) -> float:
        return totals.tolist()[0] ** 0.5

    def step() -> None:
        training_step(engine, optimizer, batch, agree, 1e-3)

    step()
    return counted(rank, engine.meter, optimizer, step)[1].model_dump()


@pytest.mark.parametrize(("model_name", "text", "routing"), CASES)
def test_a_dry_run_of_every_rank_equals_the_real_run(model_name: str, text: str, routing: str):
    strategy = Strategy.parse(text)
    real = run_ranks(measure, strategy.world_size, model_name, strategy, routing)
    for rank, measured in enumerate(real):
        footprint = dry_run(MODELS[model_name], TRAIN, strategy, rank=rank, routing=routing)
        assert footprint.report.model_dump() == measured


@pytest.mark.parametrize(("balance", "text"), BALANCED_CASES)
def test_a_dry_run_of_a_job_that_balances_equals_the_real_run(balance: str, text: str):
    strategy, routing = Strategy.parse(text), "lognormal:max=1.8"
    job = TRAIN.model_copy(update={"balance": BALANCES[balance]})
    real = run_ranks(measure, strategy.world_size, "rich", strategy, routing, job)
    for rank, measured in enumerate(real):
        footprint = dry_run(MODELS["rich"], job, strategy, rank=rank, routing=routing)
        assert footprint.report.model_dump() == measured

"""What the resource model says of FLOPs, parameters and traffic is what a dry run counts, to the unit; its peak memory
is within -1 and +2 % of it."""

from __future__ import annotations

import json

import pytest
from tests.resources.case_list import FAMILIES, SCHEDULES, Case, cases
from tests.resources.compared import PLATFORM, compare

from pipermoe.dryrun.dry_run import dry_run
from pipermoe.dryrun.planned_routing import planned_counts
from pipermoe.resources.dispatch import skewed
from pipermoe.resources.step import predict
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


@pytest.mark.parametrize(
    ("strategy", "routing"),
    [
        ("pp1 dp4 ep4 mbs1 1f1b", "lognormal:sigma=0.5"),
        pytest.param("pp2 dp4 ep4 mbs1 1f1b", "lognormal:sigma=1.0", marks=pytest.mark.slow),
        pytest.param("pp1 dp4 ep2 edp2 mbs2 1f1b", "lognormal:sigma=0.5", marks=pytest.mark.slow),
        pytest.param("pp1 dp8 ep8 mbs1 1f1b", "lognormal:max=2", marks=pytest.mark.slow),
    ],
)
def test_under_an_imbalance_the_busiest_rank_computes_sends_and_holds_what_it_does_in_a_dry_run(strategy, routing):
    model, arrangement = FAMILIES["plain"], Strategy.parse(strategy)
    train = TrainConfig(seq_len=128, global_batch_size=4 * arrangement.data_parallel * arrangement.micro_batch_size)
    moe, ranks = model.moe, arrangement.expert_parallel
    tokens = arrangement.micro_batch_size * train.seq_len
    counts_PE = planned_counts(routing, tokens=tokens, top_k=moe.top_k, experts=moe.num_experts, sources=ranks)
    load_P = counts_PE.sum(0).reshape(ranks, -1).sum(1)
    busiest = int(load_P.argmax())
    guess = predict(model, PLATFORM, train, arrangement, load_P.max() / load_P.mean()).ranks[busiest]
    truth = dry_run(model, train, arrangement, rank=busiest, routing=routing).report
    assert load_P.max() > 1.1 * load_P.mean()
    assert guess.flops == truth.flops
    assert guess.traffic["all_to_all.ep"] == truth.traffic["all_to_all.ep"]
    assert -0.01 <= guess.peak_bytes / truth.peak_bytes - 1 <= 0.02


@pytest.mark.parametrize(
    "strategy",
    [
        "pp1 dp4 ep4 mbs1 1f1b deduplicated",
        pytest.param("pp1 dp4 ep4 mbs1 1f1b deduplicated:2", marks=pytest.mark.slow),
        pytest.param("pp2 dp8 ep8 mbs1 1f1b deduplicated:2", marks=pytest.mark.slow),
    ],
)
def test_deduplicated_dispatch_sends_under_an_imbalance_what_a_dry_run_of_that_routing_sends(strategy, tmp_path):
    model, arrangement, busiest, imbalance = FAMILIES["plain"], Strategy.parse(strategy), 2, 1.5
    train = TrainConfig(seq_len=128, global_batch_size=4 * arrangement.data_parallel)
    widths = train.seq_len * model.moe.top_k, model.moe.top_k, model.moe.num_experts, arrangement.expert_parallel
    routing = tmp_path / "counts.json"
    routing.write_text(json.dumps({"counts": skewed(*widths, imbalance, busiest).tolist()}))
    guess = predict(model, PLATFORM, train, arrangement, imbalance).ranks[busiest]
    truth = dry_run(model, train, arrangement, rank=busiest, routing=str(routing)).report
    assert guess.flops == truth.flops
    assert guess.traffic.keys() - {"all_to_all_counts.ep"} == truth.traffic.keys()
    assert all(guess.traffic[key] == sent for key, sent in truth.traffic.items())
    assert -0.01 <= guess.peak_bytes / truth.peak_bytes - 1 <= 0.02


def test_the_list_has_every_family_and_schedule_and_no_case_twice():
    assert len(set(map(str, cases()))) == len(cases()) >= 60
    assert {case.model.name for case in cases()} == set(FAMILIES)
    assert {case.strategy.schedule for case in cases()} == set(SCHEDULES)

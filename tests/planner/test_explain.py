"""The explanation of a plan adds up, and every claim in it is a prediction of the same model."""

import pytest
from tests.resources.cases import MODEL, TRAIN, machine

from pipermoe.planner import find_plan
from pipermoe.planner.candidate import candidate
from pipermoe.planner.explain import explain
from pipermoe.planner.given import explain_given, plan_given
from pipermoe.planner.job import Job
from pipermoe.planner.other_machines import with_flat_network, with_network
from pipermoe.resources.step import predict
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.errors import UserError
from pipermoe.specs.platform_file import load_platform
from pipermoe.specs.runtimes import runs_on
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

MIB = 2**20
BUDGET = 5 * MIB  # some of the neighbours of the best strategy do not fit


def given(text: str, imbalance: float = 1.0, slots: float | None = None):
    configuration = Configuration(model=MODEL, train=TRAIN, strategy=Strategy.parse(text))
    platform = machine(compute_slots=slots)
    return explain_given(configuration, platform, memory_budget_bytes=BUDGET, headroom=0, imbalance=imbalance)


@pytest.mark.parametrize("text", ["pp1 dp4 ep4 mbs2 z1", "pp2 dp2 ep2 mbs1 zb-h1 z0 full", "pp4 dp1 ep1 mbs2 z0"])
@pytest.mark.parametrize(("imbalance", "slots"), [(1.0, 4), (1.5, 4), (1.5, 2)])
def test_the_parts_of_a_step_add_up_to_it(text, imbalance, slots):
    result = given(text, imbalance, slots)
    parts = result.explanation.parts
    assert sum(parts.values()) == pytest.approx(result.chosen.step_seconds, rel=1e-9)
    assert min(parts.values()) >= -1e-12
    assert (parts["imbalance"] > 0) == (imbalance > 1)
    assert (parts["recompute"] > 0) == text.endswith("full")


def test_neighbours_cost_or_lack_what_is_said():
    result = find_plan(MODEL, machine(), TRAIN, world_size=4, memory_budget_bytes=BUDGET, headroom=0)
    others = result.explanation.alternatives
    assert {other.fits for other in others} == {True, False}
    for other in others:
        report = predict(MODEL, machine(), TRAIN, other.strategy)
        peak = report.ranks[other.rank].peak_bytes
        assert other.slower_seconds == report.step_seconds - result.chosen.step_seconds
        assert peak == max(rank.peak_bytes for rank in report.ranks)
        assert (peak <= BUDGET) == other.fits
        assert other.fits or peak == BUDGET + other.missing_bytes


def test_neighbours_of_a_given_strategy_are_held_to_what_runs_that():
    result = given("pp1 dp2 tp2 ep4 mbs2 1f1b z1")
    assert result.plan.runs_on == ("megatron",)
    others = result.explanation.alternatives
    assert {other.runs for other in others} == {True, False}
    assert all(other.runs == ("megatron" in runs_on(MODEL, TRAIN, other.strategy)) for other in others)


def test_a_what_if_is_the_same_strategy_under_another_condition():
    result = given("pp2 dp2 ep2 mbs1 1f1b z1")
    by_name = {change.name: change for change in result.explanation.what_ifs}
    uneven = predict(MODEL, machine(), TRAIN, result.chosen.strategy, imbalance=1.3)
    assert by_name["routing imbalance 1.3"].step_seconds == uneven.step_seconds
    assert by_name["routing imbalance 1.3"].peak_bytes == max(rank.peak_bytes for rank in uneven.ranks)
    assert by_name["network twice as fast"].gain > 0
    larger = TRAIN.model_copy(update={"global_batch_size": 2 * TRAIN.global_batch_size})
    speed = larger.tokens_per_step / predict(MODEL, machine(), larger, result.chosen.strategy).step_seconds
    assert by_name["twice the global batch"].gain == pytest.approx(speed / result.chosen.tokens_per_second - 1)


def test_memory_is_the_wall_when_what_does_not_fit_would_save_most():
    job = Job(MODEL, machine(), TRAIN, 4, BUDGET)
    strategy = Strategy.parse("pp1 dp4 ep4 mbs1 z1")
    chosen = candidate(job, strategy)
    assert explain(job, chosen).wall != "memory"
    explanation = explain(job, chosen, unlimited=(strategy, 0.01 * chosen.step_seconds))
    assert explanation.wall == "memory"
    assert explanation.walls["memory"] == pytest.approx(0.99 * chosen.step_seconds)


def test_a_given_strategy_must_be_legal_and_its_schedule_must_exist():
    with pytest.raises(UserError, match=r"strategy.expert_parallel = 3: must divide num_experts = 8"):
        given("pp1 dp3 ep3 mbs1")
    with pytest.raises(UserError, match="virtual_stages"):
        given("pp2 dp2 ep2 mbs1 zb-v")


def test_latent_attention_is_planned():
    model, platform = load_model("deepseek-v3"), load_platform("dgx-h100")
    train = TrainConfig(seq_len=4096, global_batch_size=256, precision="bf16")
    strategy = Strategy.parse("pp8 dp16 ep16 mbs1 1f1b z1 full")
    plan = plan_given(Configuration(model=model, train=train, strategy=strategy), platform)
    assert plan.prediction.step_seconds > 0
    assert plan.inputs["state_bytes.master"].value == 4


def test_bottlenecks_are_measured_by_taking_them_away():
    result = given("pp2 dp2 ep2 mbs1 1f1b z1")
    found = {finding.name: finding for finding in result.explanation.findings}
    quiet = with_network(machine(), latency=0.0)
    assert {cost.latency_seconds for level in quiet.levels for cost in level.cost.values()} == {0.0}
    without = predict(MODEL, quiet, TRAIN, result.chosen.strategy).step_seconds
    assert found["all-to-all latency"].seconds == pytest.approx(result.chosen.step_seconds - without)
    overlapped = result.chosen.strategy.model_copy(update={"schedule": "1f1b-overlap"})
    gain = result.chosen.step_seconds - predict(MODEL, machine(), TRAIN, overlapped).step_seconds
    assert found["insufficient overlap"].seconds == pytest.approx(gain)


def test_a_flat_network_is_the_innermost_level_for_all():
    flat = with_flat_network(machine(ranks=8))
    assert [level.ranks for level in flat.levels] == [8]
    assert flat.levels[0].cost == machine(ranks=8).levels[0].cost

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.resources.cases import MODEL, TRAIN, machine

from pipermoe.resources.step import predict, shared_seconds, step_costs
from pipermoe.schedule.builders import RECIPES, illegal
from pipermoe.specs.report import TERMS
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig


@st.composite
def strategies(draw):
    name = draw(st.sampled_from(list(RECIPES)))
    chunks = RECIPES[name].virtual_stages[0]
    fewest = 6  # micro-batches of any strategy here
    pipelines = [ranks for ranks in range(1, 6 // chunks + 1) if not illegal(name, ranks, fewest, chunks)]
    cp, tp = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    ep, edp, etp = (draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2])))
    recompute = draw(st.sampled_from(["none", "full", "selective"]))
    return Strategy(
        pipeline_parallel=draw(st.sampled_from(pipelines)),
        virtual_stages=chunks,
        data_parallel=ep * edp * etp,
        context_parallel=cp,
        tensor_parallel=tp,
        expert_parallel=ep,
        expert_data_parallel=edp * cp * tp,
        expert_tensor_parallel=etp,
        micro_batch_size=draw(st.sampled_from([1, 2])),
        schedule=name,
        recompute=recompute,
        recompute_modules=("norm", "experts", "dense_mlp") if recompute == "selective" else (),
        zero_dense=draw(st.integers(0, 3)),
        zero_expert=draw(st.integers(0, 3)),
    )


@settings(deadline=None, max_examples=30)
@given(strategies(), st.sampled_from([1.5, 384]))
def test_on_every_rank_the_terms_add_up_to_the_step(strategy, slots):
    report = predict(
        MODEL,
        machine(ranks=384, compute_slots=slots, meeting_seconds={4: 1e-3}),
        TrainConfig(seq_len=32, global_batch_size=192),
        strategy,
    )
    for rank in report.ranks:
        assert sum(rank.seconds[term] for term in TERMS) == pytest.approx(report.step_seconds)
        assert min(rank.seconds.values()) >= -1e-12


def test_a_strategy_costs_the_same_alone_as_among_others():
    platform = machine(ranks=8)
    rows = [
        Strategy(pipeline_parallel=2, data_parallel=2, expert_parallel=e, expert_data_parallel=2 // e) for e in (1, 2)
    ]
    together = step_costs(MODEL, platform, TRAIN, StrategyTable.of(rows))
    for index, row in enumerate(rows):
        alone = step_costs(MODEL, platform, TRAIN, StrategyTable.of([row]))
        assert alone.forward[0].tolist() == together.forward[index].tolist()
        assert alone.forward_exchange[0].tolist() == together.forward_exchange[index].tolist()


def test_the_busiest_stage_works_through_every_micro_batch_and_waits_for_the_others_to_fill_and_drain():
    platform = machine(ranks=2)
    strategy = Strategy(pipeline_parallel=2)
    costs = step_costs(MODEL, platform, TRAIN, StrategyTable.of([strategy]))
    forward, backward = costs.forward[0], costs.input_grad[0] + costs.weight_grad[0]
    report = predict(MODEL, platform, TRAIN, strategy)
    busiest = int(np.argmax(forward + backward))
    assert report.ranks[busiest].seconds["forward"] == pytest.approx(16 * forward[busiest])
    assert report.ranks[busiest].seconds["backward"] == pytest.approx(16 * backward[busiest])
    bubble = report.step_seconds - 16 * (forward + backward)[busiest]
    assert bubble >= (forward + backward)[1 - busiest]  # filling and draining through the other stage


def test_flops_of_all_ranks_do_not_depend_on_the_arrangement():
    platform = machine(ranks=4)
    totals = {
        sum(rank.flops for rank in predict(MODEL, platform, TRAIN, strategy).ranks)
        for strategy in (
            Strategy(),
            Strategy(pipeline_parallel=4, micro_batch_size=4),
            Strategy(data_parallel=4, expert_parallel=4),
            Strategy(pipeline_parallel=2, data_parallel=2, expert_data_parallel=2, layer_split=(4, 2)),
        )
    }
    assert len(totals) == 1


def test_ranks_that_share_cores_take_longer_but_never_longer_than_one_after_the_other():
    strategy = Strategy(data_parallel=4, expert_parallel=4)
    alone, shared = (predict(MODEL, machine(4, slots), TRAIN, strategy).step_seconds for slots in (4, 2))
    assert alone < shared <= 2 * alone


def test_work_that_starts_together_on_shared_cores_finishes_by_processor_sharing():
    assert shared_seconds([1.0, 1.0], ranks_per_stage=1, slots=2) == [1.0, 1.0]
    assert shared_seconds([1.0, 1.0], ranks_per_stage=2, slots=2) == [2.0, 2.0]
    # Both run at half speed until the shorter is done at 2, then the longer goes on alone at full speed.
    assert shared_seconds([3.0, 1.0], ranks_per_stage=1, slots=1) == [4.0, 2.0]

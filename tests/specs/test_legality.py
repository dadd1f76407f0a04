import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipermoe.specs.legality import LEGAL, Job, legal_mask, violations
from pipermoe.specs.model import GroupedQueryAttention, MixtureOfExperts, ModelSpec
from pipermoe.specs.runtimes.own import EXECUTABLE
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import COLUMNS, StrategyTable
from pipermoe.specs.train import TrainConfig

MODEL = ModelSpec(
    name="m",
    vocab_size=256,
    hidden_size=64,
    num_layers=6,
    attention=GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=16),
    moe=MixtureOfExperts(num_experts=128, top_k=2, expert_width=32),
)
TRAIN = TrainConfig(seq_len=32, global_batch_size=48)
RULES = (*LEGAL, *EXECUTABLE)


def test_a_legal_strategy_has_no_violations():
    strategy = Strategy(pipeline_parallel=2, data_parallel=2, expert_parallel=2, micro_batch_size=2)
    assert violations(strategy, MODEL, TRAIN, 4, RULES) == []


@pytest.mark.parametrize(
    ("changes", "world_size", "line"),
    [
        (
            {"data_parallel": 8, "expert_parallel": 8, "dispatcher": "deduplicated", "ranks_per_copy": 8},
            8,
            "strategy.ranks_per_copy = 8: must divide expert_parallel = 8 into several blocks: 2, 4",
        ),
        (
            {"data_parallel": 12, "expert_parallel": 12},
            12,
            "strategy.expert_parallel = 12: must divide num_experts = 128; nearest: 8, 16",
        ),
        (
            {"pipeline_parallel": 2, "data_parallel": 2, "expert_parallel": 2},
            6,
            "strategy.pipeline_parallel * data_parallel * context_parallel * tensor_parallel = 4: "
            "must equal the number of ranks = 6; pipeline_parallel = 3 would",
        ),
        (
            {"pipeline_parallel": 8},
            8,
            "strategy.pipeline_parallel * virtual_stages = 8: every stage needs a layer and the model has "
            "num_layers = 6; at most 6",
        ),
        (
            {"data_parallel": 1, "micro_batch_size": 5},
            1,
            "strategy.data_parallel * micro_batch_size = 5: must divide global_batch_size = 48; "
            "nearest micro_batch_size: 4, 6",
        ),
        (
            {"data_parallel": 32, "expert_parallel": 32},
            32,
            "strategy.data_parallel * micro_batch_size = 32: must divide global_batch_size = 48; "
            "nearest data_parallel: 16, 24",
        ),
        (
            {"pipeline_parallel": 4, "micro_batch_size": 16},
            4,
            "strategy.micro_batch_size = 16: gives 3 micro-batches, and 1f1b needs at least pipeline_parallel = 4; "
            "use gpipe, a smaller micro-batch or a larger global batch",
        ),
        (
            {"pipeline_parallel": 2, "layer_split": (4, 3)},
            2,
            "strategy.layer_split = [4, 3]: must give 2 stages with 6 layers in all; leave it out for an even split",
        ),
        (
            {"tensor_parallel": 2, "expert_parallel": 2},
            2,
            "strategy.tensor_parallel = 2: this runtime executes 1 only",
        ),
    ],
)
def test_every_broken_rule_is_one_line_that_names_key_value_rule_and_way_out(changes, world_size, line):
    assert violations(Strategy(**changes), MODEL, TRAIN, world_size, RULES) == [line]


def test_another_system_may_execute_what_this_runtime_cannot():
    strategy = Strategy(tensor_parallel=2, expert_parallel=2, zero_dense=3)
    assert violations(strategy, MODEL, TRAIN, 2) == []


degrees = st.sampled_from([1, 2, 3, 4, 5, 6, 8])


@st.composite
def any_strategy(draw):
    edp, ep, etp = draw(degrees), draw(degrees), draw(st.sampled_from([1, 1, 2]))
    recompute = draw(st.sampled_from(["none", "selective", "full"]))
    return Strategy(
        pipeline_parallel=draw(degrees),
        data_parallel=edp * ep * etp,
        expert_data_parallel=edp,
        expert_parallel=ep,
        expert_tensor_parallel=etp,
        micro_batch_size=draw(degrees),
        schedule=draw(st.sampled_from(["gpipe", "1f1b", "dualpipe"])),
        recompute=recompute,
        recompute_modules=("experts", "norm") if recompute == "selective" else (),
        zero_dense=draw(st.integers(0, 3)),
        layer_split=draw(st.sampled_from([(), (3, 3), (2, 2, 2), (5, 1)])),
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(any_strategy(), min_size=1, max_size=20), st.sampled_from([1, 2, 4, 6, 8, 12, 24]))
def test_the_mask_over_a_table_and_the_sentences_for_one_row_agree(strategies, world_size):
    mask = legal_mask(StrategyTable.of(strategies), MODEL, TRAIN, world_size, RULES)
    assert mask.tolist() == [not violations(s, MODEL, TRAIN, world_size, RULES) for s in strategies]


def test_a_table_gives_back_the_strategies_it_was_made_of():
    strategies = [
        Strategy(pipeline_parallel=2, layer_split=(4, 2), recompute="full", schedule="gpipe"),
        Strategy(data_parallel=4, expert_parallel=2, expert_data_parallel=2, zero_dense=1, micro_batch_size=3),
    ]
    table = StrategyTable.of(strategies)
    assert [table.row(index) for index in range(len(table))] == strategies
    assert [table.take(np.array([1])).row(0)] == strategies[1:]


def test_a_product_holds_every_combination_once():
    table = StrategyTable.product(pipeline_parallel=[1, 2], micro_batch_size=[1, 2, 4], zero_dense=[0, 1])
    rows = set(zip(*(getattr(table, name).tolist() for name in COLUMNS), strict=True))
    assert len(table) == len(rows) == 12


def test_every_rule_judges_all_rows_at_once():
    table = StrategyTable.product(micro_batch_size=range(1, 101), data_parallel=range(1, 101))
    job = Job(MODEL, TRAIN, 4)
    assert {np.shape(rule.holds(table, job)) for rule in RULES} == {(10_000,)}

"""The dry run explains its totals, agrees with the resource model, and refuses what cannot be run in one line."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.resources.cases import MODEL, TRAIN, machine
from tests.runtime.tiny import MODELS
from tests.runtime.tiny import TRAIN as TINY

from pipermoe.dryrun.dry_run import dry_run
from pipermoe.dryrun.planned_routing import apportion, balanced, planned_counts
from pipermoe.resources.step import predict
from pipermoe.specs.errors import UserError
from pipermoe.specs.strategy import Strategy

SIZES = {"tokens": 16, "top_k": 2, "experts": 8, "sources": 4}


@pytest.mark.parametrize(
    "text",
    [
        "pp2 dp2 ep2 z1 mbs2 1f1b",
        "pp3 dp4 ep2 z1 1f1b full",
        "pp2 dp8 ep8 gpipe z0/1",
        "pp1 dp4 ep2 z1",
        "pp1 dp8 ep8 deduplicated:4",
    ],
)
def test_a_dry_run_equals_the_prediction_in_flops_and_traffic_and_within_2_percent_in_peak(text):
    strategy = Strategy.parse(text)
    predicted = predict(MODEL, machine(strategy.world_size), TRAIN, strategy)
    for rank in range(0, strategy.world_size, strategy.ranks_per_stage):
        expected, counted = predicted.ranks[rank], dry_run(MODEL, TRAIN, strategy, rank=rank).report
        traffic = {key: sent for key, sent in expected.traffic.items() if not key.startswith("all_to_all_counts")}
        assert counted.flops == expected.flops
        assert counted.traffic == traffic
        assert counted.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.02)


def test_actions_and_modules_add_up_to_the_report():
    footprint = dry_run(MODELS["rich"], TINY, Strategy.parse("pp2 vpp2 dp2 ep2 z1 zb-v"), rank=1)
    report, actions = footprint.report, footprint.actions
    assert sum(action.flops for action in actions) == report.flops == sum(footprint.flops_by_module.values())
    for key, sent in report.traffic.items():
        assert sum(action.traffic[key].bytes for action in actions if key in action.traffic) == sent.bytes
        assert sum(action.traffic[key].calls for action in actions if key in action.traffic) == sent.calls
    assert max(action.peak_bytes for action in actions) == report.peak_bytes == footprint.peak_action.peak_bytes
    assert sum(report.memory_bytes.values()) == report.peak_bytes
    assert footprint.peak_action in actions
    assert (footprint.stages, footprint.layers) == ((0, 3), (0, 3))


@pytest.mark.parametrize("dispatcher", ["all_to_all", "deduplicated"])
def test_nothing_of_a_micro_batch_waits_for_the_garbage_collector(dispatcher):
    gc.disable()
    try:
        actions = dry_run(MODELS["plain"], TINY, Strategy.parse(f"pp1 dp2 ep2 1f1b {dispatcher}"), rank=0).actions
    finally:
        gc.enable()
    forwards = [action.peak_bytes for action in actions if action.kind == "F"]
    assert len(forwards) > 2
    assert forwards == forwards[:1] * len(forwards)


def test_flops_belong_to_the_module_whose_weights_they_use():
    model, tokens = MODELS["rich"], TINY.global_batch_size * TINY.seq_len
    modules = dry_run(model, TINY, Strategy(), rank=0).flops_by_module
    moe, layers = model.moe, len(model.moe_layers)
    assert modules["router"] == 3 * layers * 2 * tokens * model.hidden_size * moe.num_experts
    assert modules["experts"] == 3 * layers * 2 * tokens * moe.top_k * 3 * model.hidden_size * moe.expert_width
    assert modules["head"] == 3 * 2 * tokens * model.hidden_size * model.vocab_size
    assert modules["mlp"] == 3 * 2 * tokens * 3 * model.hidden_size * model.dense_width


def test_weight_gradients_of_a_split_backward_communicate_nothing_but_their_sums_over_ranks():
    footprint = dry_run(MODELS["plain"], TINY, Strategy.parse("pp2 dp2 ep2 zb-h1"), rank=0)
    weight_gradients = [action for action in footprint.actions if action.kind == "W"]
    assert len(weight_gradients) == footprint.microbatches
    assert all(action.flops > 0 for action in weight_gradients)
    assert [set(action.traffic) for action in weight_gradients] == [set()] * (len(weight_gradients) - 1) + [
        {"all_reduce.dp"}
    ]


def test_the_rank_with_more_rows_holds_more():
    strategy = Strategy.parse("pp1 dp4 ep4")
    routing = "lognormal:max=2.5"
    busiest = dry_run(MODELS["plain"], TINY, strategy, rank=0, routing=routing).routing.busiest_rank
    peaks = [dry_run(MODELS["plain"], TINY, strategy, rank=r, routing=routing).report.peak_bytes for r in range(4)]
    assert max(peaks) == peaks[busiest] > min(peaks)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("pp2 dp2 ep2", {"rank": 4}, "--rank = 4: must be between 0 and 3, the job has 4 ranks"),
        ("pp2 dp2 ep2", {"rank": -1}, "--rank = -1: must be between 0 and 3, the job has 4 ranks"),
        ("pp2 dp2 ep2", {"rank": 0, "world_size": 8}, "must equal the number of ranks = 8; pipeline_parallel = 4"),
        ("pp1 dp3 ep3", {"rank": 0}, "strategy.expert_parallel = 3: must divide num_experts = 8"),
        ("pp2 tp2 dp1 ep2", {"rank": 0}, "strategy.tensor_parallel = 2: this runtime executes 1 only"),
        ("pp2 dp2 ep2 zb-v", {"rank": 0}, "virtual_stages = 1: zb-v needs exactly 2"),
        ("pp1 dp2 ep2", {"rank": 0, "routing": "skewed"}, "--routing = 'skewed': accepted: balanced"),
        ("pp1 dp2 ep2", {"rank": 0, "routing": "lognormal:max=5"}, "between 1 and num_experts / top_k = 4"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(text, options, message):
    with pytest.raises(UserError) as refused:
        dry_run(MODELS["plain"], TINY, Strategy.parse(text), **options)
    assert message in str(refused.value).splitlines()[0]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"counts": [[4] * 8] * 3}, "must have a row for each of the 4 expert-parallel ranks, not 3"),
        ({"counts": [[4] * 8] * 3 + [[5] * 8]}, "counts[3] sums to 40: must be micro_batch_size * seq_len * top_k"),
        ({"counts": [[20, 12] + [0] * 6] * 4}, "counts[0][0] = 20: must be at most the 16 tokens"),
        ({"counts": [[4.5, 3.5] + [4] * 6] * 4}, "counts[0]: must hold whole numbers"),
        ({"shares": [1] * 7}, "must be a list with one share for each of the 8 experts, not 7 of them"),
        ({"shares": [-1] + [1] * 7}, "shares: must hold numbers of at least 0"),
        ({"shares": [0] * 8}, "must not all be zero"),
        ({"loads": []}, 'must hold one key, "shares" or "counts"'),
    ],
)
def test_counts_that_do_not_fit_are_refused(tmp_path, document, message):
    path = tmp_path / "routing.json"
    path.write_text(json.dumps(document))
    with pytest.raises(UserError) as refused:
        planned_counts(str(path), **SIZES)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


def test_counts_and_shares_of_a_file_are_used(tmp_path):
    path = tmp_path / "routing.json"
    rows = [[0, 0, 0, 0, 0, 0, 16, 16], [4] * 8, [8, 8, 8, 8, 0, 0, 0, 0], [1, 7, 4, 4, 4, 4, 4, 4]]
    path.write_text(json.dumps({"counts": rows}))
    assert planned_counts(str(path), **SIZES).tolist() == rows
    path.write_text(json.dumps({"shares": [3, 1, 1, 1, 1, 1, 0, 0]}))
    assert planned_counts(str(path), **SIZES).tolist() == [[12, 4, 4, 4, 4, 4, 0, 0]] * 4


def test_a_lognormal_load_has_the_maximum_that_was_asked_for():
    counts = planned_counts("lognormal:max=1.5", tokens=100_000, top_k=2, experts=64, sources=2, seed=3)
    assert counts.max() / counts.mean() == pytest.approx(1.5, rel=1e-3)
    assert (counts[0] == counts[1]).all()


@settings(deadline=None, max_examples=60)
@given(
    shares=st.lists(st.floats(0, 1e6), min_size=2, max_size=20).filter(lambda s: sum(s) > 1e-3),
    tokens=st.integers(1, 300),
    data=st.data(),
)
def test_rows_are_apportioned_whole_and_no_expert_gets_more_than_the_tokens(shares, tokens, data):
    rows = tokens * data.draw(st.integers(1, len(shares)))
    counts = apportion(np.array(shares), rows, tokens)
    assert counts.sum() == rows
    assert counts.min() >= 0
    assert counts.max() <= tokens


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 1000), experts=st.integers(1, 40), sources=st.integers(1, 12))
def test_balanced_counts_differ_by_one_at_most_in_every_row_and_in_their_sum(rows, experts, sources):
    counts = balanced(rows, experts, sources)
    assert (counts.sum(1) == rows).all()
    assert np.ptp(counts, axis=1).max() <= 1
    assert np.ptp(counts.sum(0)) <= 1

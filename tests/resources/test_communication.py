import numpy as np
import pytest
from hypothesis import given, settings
from tests.resources.cases import MODEL, TRAIN, link, machine
from tests.specs.test_mesh import folded

from pipermoe.exchange.regular import planned_seconds
from pipermoe.resources.activations.sizes import sizes_of
from pipermoe.resources.communication import exchange_seconds, exchanges, hop_levels, send_seconds, traffic
from pipermoe.resources.rates import collective_seconds
from pipermoe.resources.states import state_elements
from pipermoe.resources.step import messages_sent, placement_of
from pipermoe.specs.mesh import groups
from pipermoe.specs.network import Level
from pipermoe.specs.spread import Spread
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable


def calls_of(strategy: Strategy) -> dict:
    """{key: [(calls, bytes) of every stage]}, for what a strategy calls at all."""
    table = StrategyTable.of([strategy])
    place = placement_of(MODEL, table)
    states, sizes = state_elements(MODEL, place.ranks, table), sizes_of(MODEL, TRAIN, table)
    found = traffic(TRAIN, sizes, place.ranks, table, states, messages_sent(place.stages_of))
    pairs = {key: list(zip(call.calls[0].tolist(), call.bytes[0].tolist(), strict=True)) for key, call in found.items()}
    return {key: value for key, value in pairs.items() if any(calls for calls, _ in value)}


def test_one_rank_calls_nothing():
    assert calls_of(Strategy()) == {}


def test_a_pipeline_sends_every_micro_batch_once_in_each_direction():
    message = 2 * 32 * 64 * 4  # sequences x tokens x hidden x fp32
    assert calls_of(Strategy(pipeline_parallel=3, micro_batch_size=2)) == {
        "send.pp": [(8, 8 * message), (16, 16 * message), (8, 8 * message)],
        "all_reduce.world": [(1, 48)] * 3,  # gradient norm, losses and the dropped share as float64
    }


def test_expert_parallelism_exchanges_the_rows_of_other_ranks_four_times_a_layer():
    found = calls_of(Strategy(data_parallel=2, expert_parallel=2, micro_batch_size=4, zero_dense=1))
    moe_layers, microbatches = 5, 2
    leaving = 4 * 32 * 2 // 2 * 64 * 4  # half of tokens x top_k rows x hidden x fp32
    assert found["all_to_all.ep"] == [(4 * moe_layers * microbatches, 4 * moe_layers * microbatches * leaving)]
    # Once a layer and micro-batch a rank tells the other its int64 counts for that rank's 4 experts.
    assert found["all_to_all_counts.ep"] == [(moe_layers * microbatches, moe_layers * microbatches * 4 * 8)]


def test_the_gradients_of_every_unit_are_reduced_once():
    experts, dense = 5 * 8 * 3 * 64 * 96, None
    found = calls_of(Strategy(data_parallel=4, expert_parallel=2, expert_data_parallel=2))
    assert found["all_reduce.edp"] == [(5, experts // 2 * 4)]  # layers with experts
    [(calls, dense)] = found["all_reduce.dp"]
    sharded = calls_of(
        Strategy(data_parallel=4, expert_parallel=2, expert_data_parallel=2, zero_dense=1, zero_expert=1)
    )
    assert calls == 8  # layers, embedding and head
    assert sharded["reduce_scatter.dp"] == sharded["all_gather.dp"] == [(8, dense)]
    assert sharded["reduce_scatter.edp"] == sharded["all_gather.edp"] == [(5, experts // 2 * 4)]
    assert "all_reduce.dp" not in sharded


def test_sequence_parallelism_gathers_and_scatters_every_block_twice_and_gathers_once_more():
    found = calls_of(Strategy(data_parallel=1, tensor_parallel=2, expert_parallel=2, micro_batch_size=16))
    hidden = 16 * 32 * 64 * 4
    blocks = 5 * 2 + 2 + 1  # attention and shared experts of 5 layers, attention and MLP of one, the head
    assert found["all_gather.tp"] == [(3 * blocks - 1, (3 * blocks - 1) * hidden)]
    assert found["reduce_scatter.tp"] == [(2 * blocks - 1, (2 * blocks - 1) * hidden)]
    halved = 16 * 32 // 2 * 2 // 2 * 64 * 4  # half of half the tokens' rows
    assert found["all_to_all.ep"] == [(4 * 5, 4 * 5 * halved)]


def test_context_parallelism_gathers_keys_and_values():
    found = calls_of(Strategy(context_parallel=2, expert_parallel=2, micro_batch_size=16))
    key_value = 16 * 32 * 2 * 2 * 16 * 4  # tokens x (keys, values) x heads x head_dim x fp32
    assert found["all_gather.cp"] == [(2 * 6, 2 * 6 * key_value)]
    assert found["reduce_scatter.cp"] == [(6, 6 * key_value)]
    assert found["all_reduce.dp"][0][0] == 8  # both ranks hold every dense parameter


def test_messages_between_stages_of_one_rank_are_not_sent():
    assert messages_sent([[0, 3], [1, 2]]).tolist() == [2, 2]  # a V: the turn is on the last rank
    assert messages_sent([[0, 2], [1, 3]]).tolist() == [3, 3]


def test_a_group_pays_the_innermost_level_that_none_of_its_groups_straddles():
    platform = machine(ranks=8)
    sizes = np.array([2, 4, 1])
    inside, across, alone = collective_seconds(platform, "all_to_all", Spread(sizes, sizes), 1e6)
    assert inside == pytest.approx(1e-3 + 1e6 / 1e9)
    assert across == pytest.approx(2e-3 + 1e6 / 0.5e9)
    assert alone == 0


def test_a_smaller_group_costs_what_the_next_larger_measured_size_costs():
    level = Level(name="all", ranks=8, cost=link(8e-3, 1e9), group_cost={4: link(4e-3, 1e9)})
    platform = machine(ranks=8).model_copy(update={"levels": (level,)})
    sizes = np.array([2, 4, 5, 8])
    assert collective_seconds(platform, "all_reduce", Spread(sizes, sizes), 0).tolist() == pytest.approx(
        [4e-3, 4e-3, 8e-3, 8e-3]
    )


def test_stages_that_share_a_block_of_ranks_send_over_its_link():
    platform = machine(ranks=4)
    pipeline = StrategyTable.of([Strategy(pipeline_parallel=4)])
    assert send_seconds(platform, pipeline, np.array([1e6]), [[0], [1], [2], [3]])[0].tolist() == pytest.approx(
        [1e-3 + 1e-3, 2e-3 + 2e-3, 1e-3 + 1e-3]
    )


@settings(deadline=None, max_examples=40)
@given(folded(degrees=(1, 2, 4)))
def test_stages_meet_on_the_level_that_holds_both_ranks_of_every_message(strategy):
    table, levels = StrategyTable.of([strategy]), [2, 8, 1024]
    stages_of = [[stage] for stage in range(strategy.pipeline_parallel)]
    [found] = hop_levels(levels, table.stage_stride, table.runs_per_stage, stages_of)
    for stage, level in enumerate(found[: strategy.pipeline_parallel - 1]):
        meetings = [
            next(i for i, block in enumerate(levels) if pipeline[stage] // block == pipeline[stage + 1] // block)
            for pipeline in groups(strategy, "pp")
        ]
        assert level == max(meetings)


def test_a_planned_exchange_is_priced_by_its_own_formulas():
    strategy = Strategy(data_parallel=4, expert_parallel=4)
    table = StrategyTable.of([strategy, strategy.model_copy(update={"exchange": "planned"})])
    platform = machine(ranks=4)
    found = exchanges(sizes_of(MODEL, TRAIN, table), placement_of(MODEL, table).stages)
    seconds = exchange_seconds(platform, found, table)
    calls = [call for call in found.forward if call.axis == "ep"]
    by_hand = [planned_seconds(platform, 4, 4, call.bytes[1, 0], call.calls[1, 0]) for call in calls]
    assert seconds.backward[1, 0] == pytest.approx(by_hand[0])
    assert seconds.forward[1, 0] == pytest.approx(sum(by_hand))
    assert seconds.backward[1, 0] < seconds.backward[0, 0]  # what stays in a pair of ranks takes its faster link

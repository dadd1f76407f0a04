import numpy as np
import pytest
from tests.resources.cases import MODEL, TRAIN, machine

from pipermoe.resources.shared_cores import carried_share, meeting_work
from pipermoe.resources.step import predict, step_costs
from pipermoe.specs.spread import Spread
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable

CROWDED = machine(ranks=4, compute_slots=2, meeting_seconds={2: 1e-3, 4: 3e-3})
SPREAD = Strategy(data_parallel=4, expert_parallel=4)


def test_ranks_that_all_exchange_at_once_take_what_was_measured_and_a_meeting_for_each_call_after_computing():
    own_cores = predict(MODEL, machine(ranks=4), TRAIN, SPREAD)
    crowded = predict(MODEL, CROWDED, TRAIN, SPREAD)
    microbatches = TRAIN.global_batch_size // 4
    meetings = microbatches * len(MODEL.moe_layers) * 4  # out and back, forward and backward; counts go with the rows
    for apart, shared in zip(own_cores.ranks, crowded.ranks, strict=True):
        assert shared.seconds["all_to_all"] == pytest.approx(apart.seconds["all_to_all"] + meetings * 3e-3)
        assert shared.seconds["forward"] == pytest.approx(2 * apart.seconds["forward"])


def test_shared_cores_hide_no_exchange_behind_computing():
    folded = Strategy(pipeline_parallel=2, data_parallel=2, expert_parallel=2)
    costs = step_costs(MODEL, CROWDED, TRAIN, StrategyTable.of([folded]))
    assert not costs.forward_exchange.any()
    work = costs.forward + costs.forward_carried + costs.input_grad + costs.backward_carried + costs.weight_grad
    microbatches = TRAIN.global_batch_size // 2
    assert predict(MODEL, CROWDED, TRAIN, folded).step_seconds > microbatches * 2 * float(work.sum()) / 2  # 2 cores


def test_the_receiver_of_a_message_pays_for_a_meeting_of_two():
    pipeline = Strategy(pipeline_parallel=2, virtual_stages=2, schedule="zb-v")
    costs = step_costs(MODEL, CROWDED, TRAIN, StrategyTable.of([pipeline]))
    assert costs.arrival[0].tolist() == [0.5e-3, 0.0, 0.5e-3]  # the two middle stages lie on one rank


def test_a_group_takes_what_the_next_larger_listed_one_does():
    sizes = np.array([1, 2, 3, 4, 8])
    assert meeting_work(CROWDED, sizes).tolist() == [0.0, 0.5e-3, 1.5e-3, 1.5e-3, 1.5e-3]
    assert not meeting_work(machine(ranks=4, meeting_seconds={2: 1e-3}), sizes).any()  # a core each


def test_cores_carry_only_what_stays_on_their_host():
    span = np.array([2, 4, 8])
    assert carried_share(CROWDED, Spread(2, span)).tolist() == [0.5, 0.5, 0.0]
    assert not carried_share(machine(ranks=4), Spread(2, span)).any()

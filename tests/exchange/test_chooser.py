"""The chooser: by prediction at first, by experience later, equally on all ranks."""

import numpy as np
import pytest
from tests.distributed.harness import run_ranks

from pipermoe.exchange.chooser import Choice, Chooser, candidates, class_of
from pipermoe.exchange.executor import Exchange
from pipermoe.exchange.topology import Topology

CLUSTER = Topology.even(
    4, 4, nics_per_node=4, nic_bandwidth=1e9, local_bandwidth=1e11, nic_latency=1e-5, message_seconds=1e-5
)


def even(size, ranks=16):
    return np.full((ranks, ranks), size, dtype=np.int64)


def test_few_bytes_take_few_messages_and_skewed_ones_take_all_nics():
    chooser = Chooser(CLUSTER)
    assert chooser.choose(even(16)).builder in ("log_step", "hierarchical")
    skewed = even(1 << 16)
    skewed[:, 5] *= 20
    assert chooser.choose(skewed).builder == "nic_balanced"


def test_what_was_measured_outweighs_what_was_predicted():
    chooser = Chooser(CLUSTER)
    counts = even(1 << 20)
    first = chooser.choose(counts)
    chooser.record(first, counts, 100.0)
    second = chooser.choose(counts)
    assert second != first
    again = Chooser.from_json(chooser.to_json(), CLUSTER)
    assert again.choose(counts) == second
    assert again.choose(even(1 << 21)) != first  # a neighbouring size profits


def test_direct_is_always_a_candidate_and_one_node_has_few_others():
    assert Choice("direct") in candidates(even(1), CLUSTER)
    assert candidates(even(1, 2), Topology.even(1, 2)) == [Choice("direct")]


@pytest.mark.parametrize(("size", "name"), [(0, "0/0"), (1 << 16, "16/0")])
def test_classes_are_powers_of_two(size, name):
    assert class_of(even(size)) == name


def learning(rank):
    exchange = Exchange(topology=Topology.even(2, 2, nics_per_node=2))
    counts = even(1000, 4)
    seconds = exchange.learn(counts, repeats=1)
    best = min(seconds, key=seconds.__getitem__)
    return seconds, str(exchange.chooser.choose(counts)) == best


@pytest.mark.distributed
def test_learning_gives_all_ranks_the_same_times_and_the_fastest_choice():
    answers = run_ranks(learning, 4)
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][1]

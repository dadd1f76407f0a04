"""Every builder on every kind of count matrix and topology: the checker proves the plan, and the checker can refuse."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipermoe.exchange.builders import BUILDERS
from pipermoe.exchange.builders.direct import group_interleaved, rotation
from pipermoe.exchange.builders.rounds import decompose
from pipermoe.exchange.checker import InvalidPlan, check
from pipermoe.exchange.plan import INPUT, OUTPUT, STAGING, byte_matrix
from pipermoe.exchange.topology import Topology


@st.composite
def topologies(draw):
    """Ragged ones: any number of ranks on a node in any order, any NIC, any group."""
    ranks = draw(st.integers(1, 12))
    node = draw(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks))
    names = sorted(set(node))
    group = draw(st.lists(st.integers(0, 2), min_size=len(names), max_size=len(names)))
    groups = sorted(set(group))
    return Topology(
        node=tuple(names.index(n) for n in node),
        nic=tuple(draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks))),
        group=tuple(groups.index(g) for g in group),
    )


@st.composite
def exchanges(draw):
    topology = draw(topologies())
    size = topology.num_ranks
    some = st.one_of(st.just(0), st.integers(0, 40))
    counts = draw(st.lists(some, min_size=size * size, max_size=size * size))
    return np.array(counts, dtype=np.int64).reshape(size, size), topology


@pytest.mark.parametrize("name", BUILDERS)
@settings(deadline=None, max_examples=25)
@given(exchange=exchanges())
def test_every_builder_makes_plans_that_the_checker_proves(name, exchange):
    counts, topology = exchange
    plan = BUILDERS[name](counts, topology)
    check(plan)
    assert replay(plan) == outputs_of(counts)


@pytest.mark.parametrize("name", ["hierarchical", "nic_balanced", "group_aware"])
@settings(deadline=None, max_examples=20)
@given(exchange=exchanges(), chunk_bytes=st.integers(1, 50))
def test_chunked_plans_are_proved_too(name, exchange, chunk_bytes):
    plan = BUILDERS[name](*exchange, chunk_bytes=chunk_bytes)
    check(plan)
    assert replay(plan) == outputs_of(exchange[0])


@settings(deadline=None, max_examples=20)
@given(exchange=exchanges(), window=st.integers(1, 4))
def test_windows_keep_the_plan_correct(exchange, window):
    for name in ("pairwise", "group_aware", "balanced_rounds"):
        check(BUILDERS[name](*exchange, window=window))


def input_of(counts, rank):
    """Bytes that tell source, destination and place apart (mod 256)."""
    return b"".join(bytes((rank * 31 + d * 7 + k) % 256 for k in range(counts[rank, d])) for d in range(len(counts)))


def outputs_of(counts):
    return [
        b"".join(bytes((s * 31 + d * 7 + k) % 256 for k in range(counts[s, d])) for s in range(len(counts)))
        for d in range(len(counts))
    ]


def replay(plan):
    """Executes the messages in order, all ranks in one process: an oracle independent of the checker."""
    memory = [
        {
            INPUT: bytearray(input_of(plan.counts, r)),
            OUTPUT: bytearray(int(plan.counts[:, r].sum())),
            STAGING: bytearray(int(plan.staging_bytes[r])),
        }
        for r in range(plan.num_ranks)
    ]
    f = plan.fragments
    for i, m in enumerate(plan.message_of_fragment):
        length = f.length[i]
        data = memory[plan.source[m]][f.source_buffer[i]][f.source_offset[i] : f.source_offset[i] + length]
        at = f.destination_offset[i]
        memory[plan.destination[m]][f.destination_buffer[i]][at : at + length] = data
    return [bytes(rank[OUTPUT]) for rank in memory]


EVEN = Topology.even(4, 4, groups=2, nics_per_node=2)


def test_hierarchical_sends_one_message_per_ordered_pair_of_nodes():
    plan = BUILDERS["hierarchical"](np.full((16, 16), 5), EVEN)
    node = EVEN.node_of
    crossing = node[plan.source] != node[plan.destination]
    assert crossing.sum() == 4 * 3
    assert set(plan.message_bytes[crossing]) == {4 * 4 * 5}


def test_every_nic_carries_its_share_whichever_device_the_data_comes_from():
    counts = np.zeros((16, 16), dtype=np.int64)
    counts[0, 4:8] = 1000  # one device of node 0 sends everything
    plan = BUILDERS["nic_balanced"](counts, EVEN)
    crossing = EVEN.node_of[plan.source] != EVEN.node_of[plan.destination]
    sent = np.bincount(EVEN.nic_port[plan.source[crossing]], plan.message_bytes[crossing], minlength=8)
    received = np.bincount(EVEN.nic_port[plan.destination[crossing]], plan.message_bytes[crossing], minlength=8)
    assert sent.tolist() == [2000, 2000, 0, 0, 0, 0, 0, 0]
    assert received.tolist() == [0, 0, 2000, 2000, 0, 0, 0, 0]


def test_every_step_of_the_group_aware_order_is_a_permutation_over_all_groups():
    group_of = np.repeat(np.arange(8), 4)
    step = group_interleaved(group_of)
    for k in range(32):
        source, destination = np.nonzero(step == k)
        assert sorted(source) == sorted(destination) == list(range(32))
    # in a step the four members of a group address four different groups; in a rotation at most two
    for order, most in ((step, 4), (rotation(32), 2)):
        reached = {len(set(group_of[np.nonzero((order == k)[:4])[1]])) for k in range(32)}
        assert max(reached) == most


def test_log_step_sends_log2_messages_per_rank():
    plan = BUILDERS["log_step"](np.full((16, 16), 3), EVEN)
    assert np.bincount(plan.source[plan.source != plan.destination]).tolist() == [4] * 16


@settings(deadline=None, max_examples=25)
@given(exchanges())
def test_balanced_rounds_last_as_long_as_the_busiest_rank(exchange):
    matrix = exchange[0] - np.diag(np.diag(exchange[0]))
    rounds = decompose(matrix)
    total, rank = np.zeros_like(matrix), np.arange(len(matrix))
    for destination, length in rounds:
        assert sorted(destination) == list(rank)
        total[rank, destination] += length
    assert (total == matrix).all()
    assert sum(int(length.max()) for _, length in rounds) == max(matrix.sum(0).max(), matrix.sum(1).max())


def changed(plan, column, index, value):
    values = getattr(plan, column).copy()
    values[index] = value
    return replace(plan, **{column: values})


def test_the_checker_refuses_what_is_wrong():
    plan = BUILDERS["hierarchical"](np.full((8, 8), 4), Topology.even(2, 4), separate_inside=True)
    check(plan)
    waits = int(np.flatnonzero(np.diff(plan.first_dependency))[0])
    with pytest.raises(InvalidPlan, match="must be an earlier one"):
        check(changed(plan, "dependency", plan.first_dependency[waits], len(plan) - 1))
    rank = plan.source[waits]
    foreign = int(np.flatnonzero((plan.source[:waits] != rank) & (plan.destination[:waits] != rank))[0])
    with pytest.raises(InvalidPlan, match="neither sends nor receives"):
        check(changed(plan, "dependency", plan.first_dependency[waits], foreign))
    none = np.zeros(0, dtype=np.int64)
    with pytest.raises(InvalidPlan, match="does not wait for it"):
        check(replace(plan, dependency=none, first_dependency=np.zeros_like(plan.first_dependency)))
    with pytest.raises(InvalidPlan, match=r"of 8 ranks"):
        check(changed(plan, "destination", 0, 8))
    moved = replace(plan.fragments, source_offset=plan.fragments.source_offset.copy())
    straight = int(np.flatnonzero(plan.fragments.destination_buffer == OUTPUT)[0])
    moved.source_offset[straight] += 1
    with pytest.raises(InvalidPlan, match="gets wrong bytes"):
        check(replace(plan, fragments=moved))


def test_the_checker_refuses_bytes_written_twice_or_never():
    plan = BUILDERS["direct"](np.full((4, 4), 4), Topology.even(4))
    twice = replace(plan.fragments, destination_offset=np.zeros_like(plan.fragments.destination_offset))
    with pytest.raises(InvalidPlan, match="write the same bytes"):
        check(replace(plan, fragments=twice))
    short = replace(plan.fragments, length=plan.fragments.length - 1)
    with pytest.raises(InvalidPlan, match="receives 12 of 16 bytes"):
        check(replace(plan, fragments=short))


@pytest.mark.parametrize(
    ("counts", "problem"),
    [([[1, 2]], "square"), ([[1, -2], [0, 0]], r"counts\[0, 1\] = -2"), ([[0.5]], "whole bytes")],
)
def test_a_bad_matrix_is_named(counts, problem):
    with pytest.raises(ValueError, match=problem):
        byte_matrix(counts)

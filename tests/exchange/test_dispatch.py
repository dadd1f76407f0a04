"""Dispatch without redundancy: the rows of a plain dispatch, fewer of them across nodes, forward and backward."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.distributed.harness import run_ranks

from pipermoe.exchange.dispatch import plan_dispatch, savings
from pipermoe.exchange.executor import Exchange, combine, dispatch, dispatch_weights
from pipermoe.exchange.topology import Topology


def routes(seed, ranks, tokens, experts, top_k, drop=0.0):
    generator = np.random.default_rng(seed)
    tables = []
    for _ in range(ranks):
        length = int(generator.integers(0, tokens + 1))
        table = np.argsort(generator.random((length, experts)), axis=1)[:, :top_k]
        tables.append(np.where(generator.random(table.shape) < drop, -1, table))
    return tables


def exchange_by_hand(parts, splits):
    """An all-to-all of row lists, all ranks in one process."""
    ends = np.cumsum(splits, axis=1)
    cut = lambda s, d: parts[s][ends[s, d] - splits[s, d] : ends[s, d]]  # noqa: E731
    size = len(parts)
    return [np.concatenate([cut(s, d) for s in range(size)]) for d in range(size)]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), nodes=st.integers(1, 3), per_node=st.integers(1, 3), top_k=st.integers(1, 4))
def test_every_row_arrives_where_and_in_the_order_of_a_plain_dispatch(seed, nodes, per_node, top_k):
    topology = Topology.even(nodes, per_node)
    size, experts = nodes * per_node, 2 * nodes * per_node + 4
    expert_rank = np.random.default_rng(seed).integers(0, size, experts)
    tables = routes(seed, size, 5, experts, top_k, drop=0.2)
    plans = [plan_dispatch(tables, expert_rank, topology, rank) for rank in range(size)]
    x = [np.array([100 * s + t for t in range(len(tables[s]))], dtype=np.int64) for s in range(size)]
    carried = exchange_by_hand([x[r][p.cross_index] for r, p in enumerate(plans)], plans[0].cross_splits)
    held = [np.concatenate([carried[r], x[r]]) for r in range(size)]
    fanned = exchange_by_hand([held[r][p.fan_index] for r, p in enumerate(plans)], plans[0].fan_splits)
    node = topology.node_of
    assert not plans[0].fan_splits[node[:, None] != node[None, :]].any()
    assert plans[0].cross_splits.sum() == savings(tables, expert_rank, topology).per_node
    for rank, plan in enumerate(plans):
        expected = sorted(
            (s, e, t, k)
            for s, table in enumerate(tables)
            for t, row in enumerate(table)
            for k, e in enumerate(row)
            if e >= 0 and expert_rank[e] == rank
        )
        assert fanned[rank][plan.expand_index].tolist() == [100 * s + t for s, _, t, _ in expected]
        assert plan.row_expert.tolist() == [e for _, e, _, _ in expected]


def layer(rank, way):
    """Dispatch, scale by expert, weight, combine: against the same computed on every rank for itself."""
    size, experts, width = dist.get_world_size(), 8, 4
    topology = Topology.even(2, 2, nics_per_node=2)
    exchange = Exchange(topology=topology, transport=way)
    tables, expert_rank = routes(3, size, 6, experts, 3), np.arange(experts) // 2
    plan = plan_dispatch(tables, expert_rank, topology, rank)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(len(tables[rank]), width, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(len(tables[rank]), 3, generator=generator, dtype=torch.float64, requires_grad=True)
    rows = dispatch(x, plan, exchange)
    scaled = rows * torch.from_numpy(plan.row_expert + 1.0)[:, None]
    out = combine(scaled * dispatch_weights(weights, plan, exchange)[:, None], plan, exchange)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad((out * direction).sum(), (x, weights))

    factor = torch.from_numpy(tables[rank] + 1.0) if len(tables[rank]) else torch.zeros(0, 3, dtype=torch.float64)
    alone = x * (weights * factor).sum(dim=1, keepdim=True)
    want = torch.autograd.grad((alone * direction).sum(), (x, weights))
    torch.testing.assert_close(out, alone, rtol=1e-12, atol=1e-12)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    return True


@pytest.mark.distributed
@pytest.mark.parametrize("way", ["auto", "process_group"])
def test_dispatch_and_combine_are_a_layer_with_the_right_gradients(way):
    assert all(run_ranks(layer, 4, way))


def test_uniform_routing_saves_what_probability_says():
    # 8 experts a token of 64, 4 nodes of 8 ranks: a choice crosses with probability 3/4; a node is missed by
    # C(48, 8) / C(64, 8) of the tokens
    topology, generator = Topology.even(4, 8), np.random.default_rng(0)
    tables = [np.argsort(generator.random((400, 64)), axis=1)[:, :8] for _ in range(32)]
    saved = savings(tables, np.arange(64) // 2, topology)
    missed = np.prod([(48 - i) / (64 - i) for i in range(8)])
    assert saved.per_choice / (32 * 400) == pytest.approx(6.0, rel=0.02)
    assert saved.per_node / (32 * 400) == pytest.approx(3 * (1 - missed), rel=0.02)
    assert saved.factor == pytest.approx(2.2, rel=0.03)

#!/usr/bin/env python3
"""Dispatch with one copy per token and node beside a plain dispatch, on the bed: time and bytes across hosts.

    python -m benchmarks.exchange_dispatch --hosts 4 --ranks-per-host 4

First by exchange plans alone, there and no further: both ways move the same rows. Then the dispatchers of the runtime,
to experts that do nothing and back, forward and backward. The factor by which bytes must fall is computed from the
routing before anything runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.exchange import Trial
from benchmarks.network import bed as network
from benchmarks.network import torch_ranks
from benchmarks.network.bed import Bed
from benchmarks.network.trial import Clock
from pipermoe.exchange.dispatch import plan_dispatch, savings
from pipermoe.exchange.executor import Exchange, all_to_all, dispatch
from pipermoe.exchange.topology import Topology
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.pipeline.deduplicated import Deduplicated
from pipermoe.runtime.pipeline.deduplicated_by_node import DeduplicatedByNode
from pipermoe.runtime.pipeline.dispatch import AllToAll, Dispatcher, ExpertGroup
from pipermoe.runtime.pipeline.planned_exchange import PlannedExchange

BUILDER = "group_aware"  # what crosses is large: straight messages


def routing(ranks: int, tokens: int, experts: int, top_k: int) -> list[np.ndarray]:
    """Uniform choices without replacement, [T, K] per rank."""
    generator = np.random.default_rng(0)
    return [np.argsort(generator.random((tokens, experts)), axis=1)[:, :top_k] for _ in range(ranks)]


def measure(rank: int, hidden: int, trial: dict, exchanges: dict[str, Exchange], clock: Clock, results: dict) -> None:
    """All ways of dispatching, in turn."""
    exchange = exchanges["auto"]
    tables = routing(exchange.size, trial["tokens"], trial["experts"], trial["top_k"])
    expert_rank = np.arange(trial["experts"]) * exchange.size // trial["experts"]
    plan = plan_dispatch(tables, expert_rank, exchange.topology, rank)
    x = torch.randn(trial["tokens"], hidden)
    choice = torch.from_numpy(plan.choice_index // trial["top_k"])
    plain = lambda: all_to_all(x[choice], plan.choice_splits, BUILDER, exchange)  # noqa: E731
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "plain": plain,
        "once a node": lambda: dispatch(x, plan, exchange, BUILDER),
    }
    assert torch.equal(calls["plain"](), calls["once a node"]())
    experts_TK = torch.from_numpy(tables[rank])
    for name, dispatcher in dispatchers(exchange.topology, rank, trial["experts"], trial["top_k"]).items():
        calls[name] = partial(round_trip, dispatcher, x, experts_TK)
    expected = calls["all_to_all"]()
    for name in ("deduplicated", "deduplicated by node"):
        assert torch.allclose(calls[name](), expected, rtol=1e-4, atol=1e-5)
    for name in calls:
        results[name] = {"seconds": [], "wire": 0}
    for _ in range(trial["iterations"]):
        for name, call in calls.items():
            dist.barrier()
            before = sum(network.counters()["down"]) if rank == 0 else 0
            seconds = clock.seconds(call, dist.barrier, 1)
            if rank == 0:
                results[name]["seconds"].append(seconds)
                results[name]["wire"] += sum(network.counters()["down"]) - before


def dispatchers(topology: Topology, rank: int, experts: int, top_k: int) -> dict[str, Dispatcher]:
    """Those of the runtime, over exchange plans. Collective."""
    meter, per_node = Meter(), topology.num_ranks // topology.num_nodes

    def part(members: dist.ProcessGroup | int | None, num_experts: int) -> ExpertGroup:
        assert isinstance(members, dist.ProcessGroup)
        return ExpertGroup(members.rank(), members.size(), num_experts, top_k, PlannedExchange(members, meter), meter)

    everyone = part(dist.group.WORLD, experts)
    nodes = [dist.new_group(list(ranks)) for ranks in topology.ranks_of_node]
    places = [dist.new_group(list(ranks)) for ranks in zip(*topology.ranks_of_node, strict=True)]
    inside = part(nodes[rank // per_node], experts // topology.num_nodes)
    across = part(places[rank % per_node], experts)
    return {
        "all_to_all": AllToAll(everyone),
        "deduplicated": Deduplicated(everyone),
        "deduplicated by node": DeduplicatedByNode(everyone, across, inside),
    }


def round_trip(dispatcher: Dispatcher, x_TD: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
    """Tokens to their experts and back, and gradients the same way: the sum over both."""
    weights_TK = torch.full(experts_TK.shape, 1 / experts_TK.shape[1])
    choices = dispatcher.choices(experts_TK, weights_TK)
    journey = dispatcher.journey(choices, dispatcher.exchange_counts(choices), lambda rows, _: rows * 2, keep=True)
    out_TD = journey.merge(journey.compute(journey.dispatch(x_TD, weights_TK)))
    return out_TD + journey.merge_gradient(journey.compute_gradient(journey.dispatch_gradient(x_TD)))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("hosts", 4),
        ("ranks-per-host", 4),
        ("tokens", 128),
        ("hidden", 512),
        ("experts", 64),
        ("top-k", 8),
        ("iterations", 6),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    # slow links: on two cores the copies inside a host must not be what is measured
    trial = Trial(Bed(arguments.hosts, 2, 1, 50, 25 * arguments.hosts), arguments.ranks_per_host)
    topology = trial.topology
    tables = routing(topology.num_ranks, arguments.tokens, arguments.experts, arguments.top_k)
    expert_rank = np.arange(arguments.experts) * topology.num_ranks // arguments.experts
    saved = savings(tables, expert_rank, topology)
    network.up(trial.bed)
    try:
        task = {
            **vars(arguments),
            "algorithms": [],
            "sizes": [arguments.hidden],
            "nics": 1,
            "limit": 120.0,
            "transports": ["auto"],
        }
        results = torch_ranks.run(task, topology, measure)
    finally:
        network.down()
    print(f"{arguments.hosts} hosts x {arguments.ranks_per_host} ranks, load {os.getloadavg()[0]:.1f}")
    row_bytes, crossings = arguments.hidden * 4, 4  # of the runtime: there and back, forward and backward
    for ways in (
        {"plain": saved.per_choice, "once a node": saved.per_node},
        {
            "all_to_all": crossings * saved.per_choice,
            "deduplicated": crossings * saved.per_rank,
            "deduplicated by node": crossings * saved.per_node,
        },
    ):
        times = {name: statistics.median(results[name]["seconds"]) for name in ways}
        first = next(iter(ways))
        for name, rows in ways.items():
            wire, before = results[name]["wire"], results[first]["wire"]
            counted = wire / arguments.iterations
            print(
                f"{name:20} {times[name] * 1e3:9.2f} ms {counted / 1e6:8.2f} MB, {counted / (rows * row_bytes):.3f} of "
                f"its rows; computed factor {ways[first] / rows:.2f}, bytes {before / wire:.2f}, "
                f"time {times[first] / times[name]:.2f}"
            )


if __name__ == "__main__":
    main()

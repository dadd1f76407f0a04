#!/usr/bin/env python3
"""Dispatch with one copy per token and node beside a plain dispatch, on the bed: time and bytes across hosts.

    python -m benchmarks.exchange_dispatch --hosts 4 --ranks-per-host 4

Both move the same rows over the same plans' executor; the factor by which bytes must fall is computed from the routing
before anything runs.
"""

from __future__ import annotations

import argparse
import os
import statistics

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

BUILDER = "group_aware"  # what crosses is large: straight messages


def routing(ranks: int, tokens: int, experts: int, top_k: int) -> list[np.ndarray]:
    """Uniform choices without replacement, [T, K] per rank."""
    generator = np.random.default_rng(0)
    return [np.argsort(generator.random((tokens, experts)), axis=1)[:, :top_k] for _ in range(ranks)]


def measure(rank: int, hidden: int, trial: dict, exchanges: dict[str, Exchange], clock: Clock, results: dict) -> None:
    """Both ways of dispatching, in turn."""
    exchange = exchanges["auto"]
    tables = routing(exchange.size, trial["tokens"], trial["experts"], trial["top_k"])
    expert_rank = np.arange(trial["experts"]) * exchange.size // trial["experts"]
    plan = plan_dispatch(tables, expert_rank, exchange.topology, rank)
    x = torch.randn(trial["tokens"], hidden)
    choice = torch.from_numpy(plan.choice_index // trial["top_k"])
    plain = lambda: all_to_all(x[choice], plan.choice_splits, BUILDER, exchange)  # noqa: E731
    calls = {"plain": plain, "deduplicated": lambda: dispatch(x, plan, exchange, BUILDER)}
    assert torch.equal(calls["plain"](), calls["deduplicated"]())
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
    times = {name: statistics.median(entry["seconds"]) for name, entry in results.items()}
    row_bytes = arguments.hidden * 4
    print(f"{arguments.hosts} hosts x {arguments.ranks_per_host} ranks, load {os.getloadavg()[0]:.1f}")
    print(f"computed: {saved.per_choice} rows cross, {saved.per_node} deduplicated: factor {saved.factor:.2f}")
    for name, rows in (("plain", saved.per_choice), ("deduplicated", saved.per_node)):
        counted = results[name]["wire"] / arguments.iterations
        print(
            f"{name:14} {times[name] * 1e3:9.2f} ms {counted / 1e6:8.2f} MB, {counted / (rows * row_bytes):.3f} of plan"
        )
    wires = results["plain"]["wire"] / results["deduplicated"]["wire"]
    print(f"measured: bytes fall {wires:.2f} times, time {times['plain'] / times['deduplicated']:.2f} times")


if __name__ == "__main__":
    main()

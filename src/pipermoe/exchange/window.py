"""The window model: an all-to-all on a dragonfly of ten thousand nodes, order by order, in seconds.

Nodes are the endpoints; every step moves m bytes from each node to another. W consecutive steps are in flight, and a
window takes as long as its bottleneck: a NIC, or the link between two groups. Exact where the bottleneck stays busy, a
lower bound otherwise. Ideal adaptive routing also uses two-hop detours over other groups, filled like water.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipermoe.exchange.network import Floats
from pipermoe.exchange.plan import Ints

Order = Literal["rotation", "group_interleaved"]
Routing = Literal["minimal", "adaptive"]


@dataclass(frozen=True, slots=True)
class Dragonfly:
    """`group[n]` of every node; bytes/s of a node's NICs together and of the link from one group to one other."""

    group: tuple[int, ...]
    node_bandwidth: float
    global_bandwidth: float
    step_latency: float = 0.0

    @classmethod
    def frontier(cls, nodes: int, *, over_groups: int = 0) -> Dragonfly:
        """Packed into groups of 128 nodes, or in equal blocks over `over_groups` groups (docs/exchange.md)."""
        size = -(-nodes // over_groups) if over_groups else 128
        return cls(tuple(n // size for n in range(nodes)), 100e9, 100e9, 2e-6)


def steps(order: Order, group: Ints) -> Iterator[Ints]:
    """The destination of every node, step by step; -1 where a node rests (groups of different sizes)."""
    nodes = len(group)
    rank = np.arange(nodes)
    if order == "rotation":
        for k in range(1, nodes):
            yield (rank + k) % nodes
        return
    groups = int(group[-1]) + 1
    first = np.searchsorted(group, np.arange(groups))
    size = np.diff(np.append(first, nodes))
    member = rank - first[group]
    most = int(size.max())
    for b in range(most):
        for a in range(groups):
            there, place = (group + a + member) % groups, (member + b) % most
            yield np.where(place < size[there], first[there] + place, -1)


def windows(order: Order, group: Ints, window: int) -> Iterator[tuple[Ints, int]]:
    """(messages between groups [G, G], messages of the busiest node) of each window."""
    groups = int(group[-1]) + 1
    rank = np.arange(len(group))
    traffic, count = np.zeros(groups * groups, dtype=np.int64), 0
    for destination in steps(order, group):
        moves = (destination >= 0) & (destination != rank)
        traffic += np.bincount(group[moves] * groups + group[destination[moves]], minlength=groups * groups)
        count += 1
        if count == window:
            yield traffic.reshape(groups, groups), count
            traffic, count = np.zeros_like(traffic), 0
    if count:
        yield traffic.reshape(groups, groups), count


def seconds(
    dragonfly: Dragonfly, bytes_per_pair: float, order: Order, window: int, routing: Routing = "minimal"
) -> float:
    """Time of an all-to-all of `bytes_per_pair` between nodes, `window` steps in flight (0: all)."""
    group = np.array(dragonfly.group)
    total = 0.0
    for traffic, count in windows(order, group, window or len(group) * (int(group[-1]) + 1)):
        total += _window_seconds(dragonfly, traffic, min(count, len(group) - 1), bytes_per_pair, routing)
        total += dragonfly.step_latency
    return total


def limit_seconds(dragonfly: Dragonfly, bytes_per_pair: float, routing: Routing = "minimal") -> float:
    """The least time of any order: all bytes of a NIC and of a pair of groups over their bandwidth."""
    size = np.bincount(dragonfly.group).astype(np.int64)
    traffic = size[:, None] * size[None, :]
    return _window_seconds(dragonfly, traffic, len(dragonfly.group) - 1, bytes_per_pair, routing)


def _window_seconds(dragonfly: Dragonfly, traffic: Ints, per_node: int, bytes_per_pair: float, routing: Routing):
    between = traffic * ~np.eye(len(traffic), dtype=bool)
    messages = between.max() if routing == "minimal" else detoured(between.astype(np.float64))
    return bytes_per_pair * max(per_node / dragonfly.node_bandwidth, messages / dragonfly.global_bandwidth)


def detoured(traffic: Floats) -> float:
    """The least load t of every link if what exceeds t takes two hops over links below t (bisection).

    A detour uses two links, so twice the excess must fit into the spare room, and in every row and column once.
    """
    off = ~np.eye(len(traffic), dtype=bool)
    low, high = 0.0, float(traffic.max(initial=0.0))
    for _ in range(30):
        load = (low + high) / 2
        excess = np.maximum(traffic - load, 0.0) * off
        spare = np.maximum(load - traffic, 0.0) * off
        fits = (
            2 * excess.sum() <= spare.sum()
            and (excess.sum(axis=1) <= spare.sum(axis=1) + 1e-9).all()
            and (excess.sum(axis=0) <= spare.sum(axis=0) + 1e-9).all()
        )
        low, high = (low, load) if fits else (load, high)
    return high

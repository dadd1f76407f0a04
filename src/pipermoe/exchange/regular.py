"""Even all-to-alls in closed form, for arrays of strategies: every rank sends `bytes_per_pair` to every other.

P ranks, R of them on a node, K NICs a node, G groups of nodes. All arguments broadcast and `Links` may hold arrays, so
that a planner prices a million strategies at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipermoe.specs.network import INSIDE_A_NODE, Level
from pipermoe.specs.platform import Platform


@dataclass(frozen=True)
class Links:
    """What a group of ranks has for its all-to-all, as in `Topology`; every field a number or an array of them."""

    ranks_per_node: Any
    nics_per_node: Any = 1
    ranks_per_group: Any = np.inf
    nic_bandwidth: Any = np.inf
    local_bandwidth: Any = np.inf
    global_bandwidth: Any = np.inf
    local_latency: Any = 0.0
    nic_latency: Any = 0.0
    global_latency: Any = 0.0
    message_seconds: Any = 0.0

    def inside(self, ranks):
        """How many of the ranks share a node."""
        return np.minimum(ranks, self.ranks_per_node)

    def in_group(self, ranks):
        """How many of the ranks share a group of nodes."""
        return np.minimum(ranks, self.ranks_per_group)


def planned_seconds(platform: Platform, group_size, span, moved_bytes, calls=1):
    """Seconds of `calls` all-to-alls by the cheapest plan, where each rank of a group sends `moved_bytes` in all.

    The group's ranks are evenly spread over `span` consecutive ranks, and all such groups exchange at the same time.
    """
    group_size, span, moved_bytes, calls = np.broadcast_arrays(group_size, span, moved_bytes, calls)
    links = links_of(platform, group_size, span)
    bytes_per_pair = moved_bytes / np.maximum(calls, 1) / np.maximum(group_size - 1, 1)
    plans = (direct_seconds, hierarchical_seconds, log_step_seconds)
    cheapest = np.min([seconds(bytes_per_pair, group_size, links) for seconds in plans], axis=0)
    return np.where(group_size > 1, calls * cheapest, 0.0)


def links_of(platform: Platform, group_size, span) -> Links:
    """The links of groups of `group_size` ranks spread over `span`, while all groups of the platform use theirs.

    A node is the last level whose links stay inside one (the innermost where costs are measured), the next level is
    reached by NICs, the outermost one joins groups of nodes. A group's share of what it has in common with others is
    that of its ranks; the traffic between groups of nodes may use all global links (ideal adaptive routing).
    """
    levels = platform.levels
    node = max((i for i, level in enumerate(levels) if level.link and level.link.topology in INSIDE_A_NODE), default=0)
    network, outermost = min(node + 1, len(levels) - 1), len(levels) - 1
    members = np.clip(group_size * (levels[node].ranks / span), 1, group_size)
    link = levels[network].link
    shared_by = link.shared_by if link else levels[node].ranks
    nics = np.maximum(members / shared_by, 1.0)
    grouped = outermost > network
    in_group = np.clip(group_size * (levels[network].ranks / span), 1, group_size) if grouped else group_size
    groups = np.maximum(group_size / in_group, 2)
    latencies = [_latency_of(levels[i]) for i in (node, network, outermost)]
    return Links(
        ranks_per_node=members,
        nics_per_node=nics,
        ranks_per_group=in_group,
        nic_bandwidth=_rank_bandwidth(platform, network) * members / nics,
        local_bandwidth=_rank_bandwidth(platform, node),
        global_bandwidth=_rank_bandwidth(platform, outermost) * in_group / (groups - 1) if grouped else np.inf,
        local_latency=latencies[0],
        nic_latency=latencies[1],
        global_latency=latencies[2] - latencies[1],
        message_seconds=np.where(
            group_size > members, _message_seconds(levels[network]), _message_seconds(levels[node])
        ),
    )


def _rank_bandwidth(platform: Platform, index: int) -> float:
    """Bytes/s that one rank sends through a level in a large all-to-all, while all ranks do."""
    level = platform.levels[index]
    if level.link is None:
        return level.cost["all_to_all"].bandwidth_bytes_per_s
    rate = level.link.collectives.get("all_to_all")
    return platform.port_bytes_per_s(index) * (rate.rate[-1] if rate else 1.0)


def _latency_of(level: Level) -> float:
    return level.link.latency_seconds if level.link else level.cost["send"].latency_seconds


def _message_seconds(level: Level) -> float:
    """A rank's time per message sent or received: what the library's all-to-all starts up in, beyond one latency."""
    if level.link is None:
        extra = level.cost["all_to_all"].latency_seconds - level.cost["send"].latency_seconds
        return max(extra, 0.0) / (2 * max(level.ranks - 1, 1))
    rate = level.link.collectives.get("all_to_all")
    return rate.latency_per_rank_seconds / 2 if rate else 0.0


def limit_seconds(bytes_per_pair, ranks, links: Links) -> np.ndarray:
    """The bound max(R (P - R) m / (K B_nic), (n R)^2 m / B_global), and (R - 1) m / B_local inside a node."""
    m, ranks = np.asarray(bytes_per_pair, dtype=np.float64), np.asarray(ranks, dtype=np.float64)
    inside, in_group = links.inside(ranks), links.in_group(ranks)
    across = inside * (ranks - inside) * m / (links.nics_per_node * links.nic_bandwidth)
    tapered = np.where(ranks > in_group, in_group**2 * m / links.global_bandwidth, 0.0)
    return np.maximum(np.maximum(across, tapered), (inside - 1) * m / links.local_bandwidth)


def direct_seconds(bytes_per_pair, ranks, links: Links) -> np.ndarray:
    """All messages at once: the bound, one latency, and 2 (P - 1) messages to handle."""
    bound = limit_seconds(bytes_per_pair, ranks, links)
    return bound + _latency(ranks, links) + 2 * (ranks - 1) * links.message_seconds


def hierarchical_seconds(bytes_per_pair, ranks, links: Links, *, chunks=1) -> np.ndarray:
    """Gather, cross, scatter with K carriers per node pair: about 2 (R - 1) + 2 (N - 1) K / R messages per rank."""
    m = np.asarray(bytes_per_pair, dtype=np.float64)
    inside = links.inside(ranks)
    nodes = ranks / inside
    bound = limit_seconds(bytes_per_pair, ranks, links)
    stage = np.where(nodes > 1, (ranks - inside) * m * (inside - 1) / inside / links.local_bandwidth, 0.0)
    messages = 4 * (inside - 1) + 2 * (nodes - 1) * np.minimum(links.nics_per_node, inside) / inside * chunks
    latency = 2 * links.local_latency + _latency(ranks, links)
    longest = np.maximum(bound, stage)
    return longest + (bound + 2 * stage - longest) / chunks + latency + messages * links.message_seconds


def log_step_seconds(bytes_per_pair, ranks, links) -> np.ndarray:
    """ceil(log2 P) rounds; in round t a rank sends P / 2 segments to the rank 2^t ahead, 2^t of R across the node."""
    m = np.asarray(bytes_per_pair, dtype=np.float64)
    rounds = np.ceil(np.log2(np.maximum(ranks, 2)))
    distance = 2.0 ** np.arange(int(rounds.max())).reshape(-1, *(1,) * np.ndim(rounds * m))
    works = distance < np.asarray(ranks)
    inside, in_group = links.inside(ranks), links.in_group(ranks)
    step = np.minimum(inside, distance) * (ranks / 2) * m / (links.nics_per_node * links.nic_bandwidth)
    far = np.minimum(in_group, distance) * (ranks / 2) * m / links.global_bandwidth
    step = np.maximum(np.where(ranks > inside, step, 0.0), np.where(ranks > in_group, far, 0.0))
    latency = _latency(ranks, links) + 2 * links.message_seconds
    return (step * works).sum(axis=0) + rounds * latency


def _latency(ranks, links: Links):
    ranks = np.asarray(ranks)
    near = links.nic_latency + (ranks > links.in_group(ranks)) * links.global_latency
    return np.where(ranks > links.inside(ranks), near, links.local_latency)

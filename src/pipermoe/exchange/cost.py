"""What an all-to-all costs in closed form: of a plan by its link loads, and of regular ones for arrays of strategies.

No plan beats `limit_seconds`: the bytes that must cross a node's NICs and a pair of groups' link, over their bandwidth.
The rest of a time is latency, work per message, and links that idle because of order and windows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pipermoe.exchange.network import network_of
from pipermoe.exchange.plan import ExchangePlan, Ints, byte_matrix
from pipermoe.exchange.topology import Topology


def limit_seconds(counts: ArrayLike, topology: Topology) -> float:
    """The least time of any plain all-to-all of these bytes: max over nodes and group pairs of bytes / bandwidth.

    A node's traffic may use all its NICs, whichever rank it belongs to. Bytes inside a node are free here.
    """
    counts = byte_matrix(counts)
    between_nodes = _sum_by(counts, topology.node_of, topology.num_nodes)
    np.fill_diagonal(between_nodes, 0)
    nics = np.array([len(nics) for nics in topology.nics_of_node])
    busiest = np.maximum(between_nodes.sum(axis=1), between_nodes.sum(axis=0)) / (nics * topology.nic_bandwidth)
    between_groups = _sum_by(counts, topology.group_of, topology.num_groups)
    np.fill_diagonal(between_groups, 0)
    return float(max(busiest.max(), between_groups.max() / topology.global_bandwidth))


def _sum_by(counts: Ints, label: Ints, size: int) -> Ints:
    total = np.zeros((size, size), dtype=np.int64)
    np.add.at(total, (label[:, None], label[None, :]), counts)
    return total


def plan_seconds(plan: ExchangePlan, topology: Topology) -> float:
    """Estimated time of a plan.

    Link time of a phase: the busiest link's bytes / bandwidth; with a window, that of every batch of `window` steps,
    one after the other. Phases overlap as far as their messages come in chunks: max + (sum - max) / chunks. Each phase
    adds its latency, and a rank handles its messages one after the other.
    """
    if not len(plan):
        return 0.0
    network = network_of(plan, topology)
    moving = plan.source != plan.destination
    phases = []
    latency = 0.0
    for phase in range(len(plan.phases)):
        here = np.flatnonzero(moving & (plan.phase == phase))
        if not len(here):
            continue
        batch = _batches(plan, here)
        phases.append(_link_seconds(network, plan.message_bytes[here], network.path[here], batch))
        latency += float(network.latency[here].max()) * (int(batch.max()) + 1)
    chunks = _chunks(plan, moving)
    longest, total = max(phases, default=0.0), sum(phases)
    handled = np.bincount(plan.source[moving], minlength=1).max(initial=0)
    handled += np.bincount(plan.destination[moving], minlength=1).max(initial=0)
    return longest + (total - longest) / chunks + latency + float(handled) * topology.message_seconds


def _batches(plan: ExchangePlan, messages: Ints) -> Ints:
    """Which of the consecutive batches of `window` steps each message falls into; one batch without a window."""
    if not plan.window:
        return np.zeros(len(messages), dtype=np.int64)
    return np.unique(plan.step[messages], return_inverse=True)[1] // plan.window


def _link_seconds(network, message_bytes: Ints, path: Ints, batch: Ints) -> float:
    """The sum over batches of the busiest link's time."""
    links = len(network.capacity) + 1
    key = batch[:, None] * links + path + 1
    load = np.bincount(key.ravel(), np.repeat(message_bytes, 3), minlength=(int(batch.max()) + 1) * links)
    load = load.reshape(-1, links)[:, 1:]
    return float((load / network.capacity).max(axis=1).sum())


def _chunks(plan: ExchangePlan, moving) -> int:
    """Into how many pieces the packets of a pair of ranks are cut, in the phase that cuts them most."""
    most = 1
    for phase in range(len(plan.phases)):
        here = moving & (plan.phase == phase)
        if here.any() and not plan.window:
            pairs = plan.source[here] * plan.num_ranks + plan.destination[here]
            most = max(most, int(np.bincount(np.unique(pairs, return_inverse=True)[1]).min()))
    return most


# Regular all-to-alls: every rank sends `bytes_per_pair` to every rank. All arguments broadcast, so that a planner
# prices a million strategies at once. R ranks a node, K NICs a node, N nodes in groups of n nodes.


def regular_limit_seconds(bytes_per_pair, ranks, ranks_per_node, nics_per_node, nodes_per_group, links) -> np.ndarray:
    """The bound max(R (P - R) m / (K B_nic), (n R)^2 m / B_global), and (R - 1) m / B_local inside a node.

    `links` is anything with the bandwidths of a Topology (a Topology, or arrays under those names).
    """
    m, ranks, ranks_per_node = (
        np.asarray(value, dtype=np.float64) for value in (bytes_per_pair, ranks, ranks_per_node)
    )
    inside = np.minimum(ranks, ranks_per_node)
    across = inside * (ranks - inside) * m / (nics_per_node * links.nic_bandwidth)
    in_group = np.minimum(ranks, nodes_per_group * ranks_per_node)
    tapered = np.where(ranks > in_group, in_group**2 * m / links.global_bandwidth, 0.0)
    return np.maximum(np.maximum(across, tapered), (inside - 1) * m / links.local_bandwidth)


def regular_direct_seconds(bytes_per_pair, ranks, ranks_per_node, nics_per_node, nodes_per_group, links) -> np.ndarray:
    """All messages at once: the bound, one latency, and 2 (P - 1) messages to handle."""
    bound = regular_limit_seconds(bytes_per_pair, ranks, ranks_per_node, nics_per_node, nodes_per_group, links)
    return bound + _latency(ranks, ranks_per_node, nodes_per_group, links) + 2 * (ranks - 1) * links.message_seconds


def regular_pairwise_seconds(
    bytes_per_pair, ranks, ranks_per_node, nics_per_node, nodes_per_group, links, *, window=1
) -> np.ndarray:
    """Rotation with a window: while W < n R a group sends to one or two others, so one global link of G - 1 works.

    (P - R) / W windows, each as long as its bottleneck: W messages of every rank over a NIC, or n R W of a group over
    one global link (exact for whole groups up to the two links of a straddling step, so an upper bound by at most 2).
    """
    m = np.asarray(bytes_per_pair, dtype=np.float64)
    inside, in_group = np.minimum(ranks, ranks_per_node), np.minimum(ranks, nodes_per_group * ranks_per_node)
    step = inside * m / (nics_per_node * links.nic_bandwidth)
    far_step = np.where(ranks > in_group, np.maximum(step, in_group * m / links.global_bandwidth), 0.0)
    bound = regular_limit_seconds(bytes_per_pair, ranks, ranks_per_node, nics_per_node, nodes_per_group, links)
    time = (in_group - inside) * step + (ranks - in_group) * far_step
    latency = _latency(ranks, ranks_per_node, nodes_per_group, links) * np.ceil((ranks - 1) / window)
    return np.maximum(time, bound) + latency + 2 * (ranks - 1) * links.message_seconds


def regular_hierarchical_seconds(
    bytes_per_pair, ranks, ranks_per_node, nics_per_node, nodes_per_group, links, *, chunks=1
) -> np.ndarray:
    """Gather, cross, scatter with K carriers per node pair: about 2 (R - 1) + 2 (N - 1) K / R messages per rank."""
    m = np.asarray(bytes_per_pair, dtype=np.float64)
    inside = np.minimum(ranks, ranks_per_node)
    nodes = ranks / inside
    bound = regular_limit_seconds(bytes_per_pair, ranks, ranks_per_node, nics_per_node, nodes_per_group, links)
    stage = np.where(nodes > 1, (ranks - inside) * m * (inside - 1) / inside / links.local_bandwidth, 0.0)
    messages = 4 * (inside - 1) + 2 * (nodes - 1) * np.minimum(nics_per_node, inside) / inside * chunks
    latency = 2 * links.local_latency + _latency(ranks, ranks_per_node, nodes_per_group, links)
    longest = np.maximum(bound, stage)
    return longest + (bound + 2 * stage - longest) / chunks + latency + messages * links.message_seconds


def regular_log_step_seconds(
    bytes_per_pair, ranks, ranks_per_node, nics_per_node, nodes_per_group, links
) -> np.ndarray:
    """ceil(log2 P) rounds; in round t a rank sends P / 2 segments to the rank 2^t ahead, 2^t of R across the node."""
    m = np.asarray(bytes_per_pair, dtype=np.float64)
    rounds = np.ceil(np.log2(np.maximum(ranks, 2)))
    distance = 2.0 ** np.arange(int(rounds.max())).reshape(-1, *(1,) * np.ndim(rounds * m))
    works = distance < np.asarray(ranks)
    inside, in_group = np.minimum(ranks, ranks_per_node), np.minimum(ranks, nodes_per_group * ranks_per_node)
    step = np.minimum(inside, distance) * (ranks / 2) * m / (nics_per_node * links.nic_bandwidth)
    far = np.minimum(in_group, distance) * (ranks / 2) * m / links.global_bandwidth
    step = np.maximum(np.where(ranks > inside, step, 0.0), np.where(ranks > in_group, far, 0.0))
    latency = _latency(ranks, ranks_per_node, nodes_per_group, links) + 2 * links.message_seconds
    return (step * works).sum(axis=0) + rounds * latency


def _latency(ranks, ranks_per_node, nodes_per_group, links):
    far = np.asarray(ranks) > np.asarray(nodes_per_group) * np.asarray(ranks_per_node)
    near = links.nic_latency + far * links.global_latency
    return np.where(np.asarray(ranks) > np.asarray(ranks_per_node), near, links.local_latency)

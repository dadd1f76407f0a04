"""What an exchange plan costs, by the loads of its links; `regular` prices even all-to-alls without a plan.

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

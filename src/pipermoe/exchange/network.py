"""The links of a topology and the path of every message over them: what cost and simulation share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.exchange.plan import ExchangePlan, Ints
from pipermoe.exchange.topology import Topology

NONE = -1
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Network:
    """L directed links. `path[m]` are the up to 3 links of message m (-1: none), `latency[m]` its seconds of travel.

    Inside a node: the port of the source, the port of the destination. Between nodes: NIC out, the link between the two
    groups if they differ (minimal routing), NIC in. A copy inside a rank uses no link.
    """

    capacity: Floats  # [L] bytes/s
    names: tuple[str, ...]  # of the kinds of links
    kind: Ints  # [L] index into names
    path: Ints  # [M, 3]
    latency: Floats  # [M]

    def load(self, message_bytes: Ints, weight: Ints | None = None) -> Floats:
        """Bytes over every link, [L]."""
        bytes_on_path = np.repeat(message_bytes if weight is None else message_bytes * weight, 3)
        load = np.bincount(self.path.ravel() + 1, weights=bytes_on_path, minlength=len(self.capacity) + 1)[1:]
        return load.astype(np.float64)


KINDS = ("port out", "port in", "nic out", "nic in", "group to group")


def network_of(plan: ExchangePlan, topology: Topology) -> Network:
    """The network as this plan's messages use it."""
    source, destination = plan.source, plan.destination
    ports, nics, groups = topology.num_ranks, int(topology.nic_port.max()) + 1, topology.num_groups
    sizes = (ports, ports, nics, nics, groups * groups)
    first = np.cumsum((0, *sizes))
    bandwidths = (
        topology.local_bandwidth,
        topology.local_bandwidth,
        topology.nic_bandwidth,
        topology.nic_bandwidth,
        topology.global_bandwidth,
    )
    node, group, nic = topology.node_of, topology.group_of, topology.nic_port
    inside = node[source] == node[destination]
    far = group[source] != group[destination]
    path = np.full((len(source), 3), NONE, dtype=np.int64)
    path[:, 0] = np.where(inside, first[0] + source, first[2] + nic[source])
    path[:, 1] = np.where(inside, first[1] + destination, first[3] + nic[destination])
    path[:, 2] = np.where(far, first[4] + group[source] * groups + group[destination], NONE)
    path[source == destination] = NONE
    latency = np.where(inside, topology.local_latency, topology.nic_latency + far * topology.global_latency)
    latency[source == destination] = 0.0
    return Network(
        np.repeat(np.array(bandwidths, dtype=np.float64), sizes),
        KINDS,
        np.repeat(np.arange(len(sizes)), sizes),
        path,
        latency,
    )

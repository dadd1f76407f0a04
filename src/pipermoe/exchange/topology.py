"""Where the ranks of an exchange stand: rank -> node, NIC and dragonfly group, and what the links carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipermoe.exchange.plan import Ints
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.network import INSIDE_A_NODE
from pipermoe.specs.platform import Platform
from pipermoe.specs.platform_file import load_platform

UNLIMITED = float("inf")
MESSAGE_SECONDS = 0.5e-6  # that a processor spends on one message, where nothing says otherwise


@dataclass(frozen=True)
class Topology:
    """R ranks on nodes with NICs, nodes in groups; bandwidths in bytes/s per direction, latencies in seconds.

    - `node[r]`, `nic[r]`: the node of rank r and the NIC of that node by which r's messages leave and arrive.
    - `group[n]`: the dragonfly group (or tree pod) of node n; between two groups runs one aggregated link each way.
    - `nic_bandwidth` of one NIC, `local_bandwidth` of one rank's port inside its node, `global_bandwidth` of the link
      from one group to one other (unlimited: the network is not tapered).
    - `message_seconds`: the time a rank's processor spends on one message, so messages of a rank do not overlap in it.
    """

    node: tuple[int, ...]
    nic: tuple[int, ...]
    group: tuple[int, ...]
    nic_bandwidth: float = UNLIMITED
    local_bandwidth: float = UNLIMITED
    global_bandwidth: float = UNLIMITED
    local_latency: float = 0.0
    nic_latency: float = 0.0
    global_latency: float = 0.0
    message_seconds: float = 0.0

    def __post_init__(self) -> None:
        if len(self.node) != len(self.nic):
            raise ValueError(f"node and nic must have one entry per rank: {len(self.node)} and {len(self.nic)}")
        if not self.node or set(self.node) != set(range(len(self.group))):
            raise ValueError(f"nodes must be 0..{len(self.group) - 1}, as `group` has {len(self.group)} entries")
        if set(self.group) != set(range(max(self.group) + 1)):
            raise ValueError(f"groups must be numbered 0, 1, ...; there are {sorted(set(self.group))}")

    @classmethod
    def even(cls, nodes: int, ranks_per_node: int = 1, groups: int = 1, nics_per_node: int = 1, **links) -> Topology:
        """Consecutive ranks fill a node, consecutive nodes a group; a node's ranks share its NICs in equal blocks."""
        if nodes % groups:
            raise ValueError(f"{nodes} nodes do not divide into {groups} groups")
        if max(ranks_per_node, nics_per_node) % min(ranks_per_node, nics_per_node):
            raise ValueError(f"{ranks_per_node} ranks cannot share {nics_per_node} NICs evenly")
        return cls(
            node=tuple(n for n in range(nodes) for _ in range(ranks_per_node)),
            nic=tuple(r * nics_per_node // ranks_per_node for _ in range(nodes) for r in range(ranks_per_node)),
            group=tuple(n // (nodes // groups) for n in range(nodes)),
            **links,
        )

    @classmethod
    def of_platform(cls, platform: Platform, ranks: int, **links) -> Topology:
        """The first `ranks` ranks of a machine whose levels are described by links.

        A node is the widest level inside a node (its NVLink domain, say); a group is the level below the outermost
        network, whose taper is shared equally by the links to all other groups. `links` replaces what follows from it.
        """
        inside = [i for i, level in enumerate(platform.levels) if level.link and level.link.topology in INSIDE_A_NODE]
        outside = [level for level in platform.levels if level.link and level.link.topology not in INSIDE_A_NODE]
        if not inside or not outside or len(inside) + len(outside) < len(platform.levels):
            rule = "needs levels described by links, inside a node and between nodes"
            raise UserError(describe_value(platform.name, "levels", [level.name for level in platform.levels], rule))
        node, near, far = platform.levels[inside[-1]], outside[0], outside[-1]
        assert node.link is not None
        assert near.link is not None
        assert far.link is not None
        grouped = near.ranks if far is not near else ranks
        carried = far.link.taper * far.link.bandwidth_bytes_per_s * near.ranks / far.link.shared_by
        return cls(
            node=tuple(r // node.ranks for r in range(ranks)),
            nic=tuple(r % node.ranks // near.link.shared_by for r in range(ranks)),
            group=tuple(n * node.ranks // grouped for n in range(-(-ranks // node.ranks))),
            **{
                "nic_bandwidth": near.link.bandwidth_bytes_per_s,
                "local_bandwidth": platform.port_bytes_per_s(inside[-1]),
                "global_bandwidth": UNLIMITED if far is near else carried / (far.ranks // near.ranks - 1),
                "local_latency": node.link.latency_seconds,
                "nic_latency": near.link.latency_seconds,
                "global_latency": far.link.latency_seconds - near.link.latency_seconds,
                "message_seconds": MESSAGE_SECONDS,
            }
            | links,
        )

    @classmethod
    def of_hosts(cls, hosts: Sequence[str], groups: Sequence[str] | None = None, **links) -> Topology:
        """From the host name of every rank (and the name of its group), in any order; one NIC per node."""
        names = list(dict.fromkeys(hosts))
        group_of_host = dict(zip(hosts, groups or [""] * len(hosts), strict=True))
        group_names = list(dict.fromkeys(group_of_host[name] for name in names))
        return cls(
            node=tuple(names.index(host) for host in hosts),
            nic=(0,) * len(hosts),
            group=tuple(group_names.index(group_of_host[name]) for name in names),
            **links,
        )

    @property
    def num_ranks(self) -> int:
        return len(self.node)

    @property
    def num_nodes(self) -> int:
        return len(self.group)

    @property
    def num_groups(self) -> int:
        return max(self.group) + 1

    @cached_property
    def node_of(self) -> Ints:
        return np.array(self.node, dtype=np.int64)

    @cached_property
    def group_of(self) -> Ints:
        """The group of every rank."""
        return np.array(self.group, dtype=np.int64)[self.node_of]

    @cached_property
    def local_index(self) -> Ints:
        """Every rank's place among the ranks of its node."""
        return _place_in(self.node_of)

    @cached_property
    def ranks_of_node(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(np.flatnonzero(self.node_of == n).tolist()) for n in range(self.num_nodes))

    @cached_property
    def nics_of_node(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted({self.nic[r] for r in ranks})) for ranks in self.ranks_of_node)

    @cached_property
    def nic_port(self) -> Ints:
        """Every rank's NIC, numbered over all nodes."""
        key = self.node_of * (max(self.nic) + 1) + np.array(self.nic)
        return np.unique(key, return_inverse=True)[1].astype(np.int64)

    def carrier(self, node: int, nic: int, turn: int) -> int:
        """A rank of `node` that uses `nic`; `turn` rotates over them."""
        ranks = [r for r in self.ranks_of_node[node] if self.nic[r] == nic]
        return ranks[turn % len(ranks)]


def _place_in(label: Ints) -> Ints:
    """For every entry how many equal ones come before it."""
    order = np.argsort(label, kind="stable")
    starts = np.searchsorted(label[order], label[order], side="left")
    place = np.empty_like(label)
    place[order] = np.arange(len(label)) - starts
    return place


def frontier(nodes: int) -> Topology:
    """`nodes` of OLCF Frontier as the catalogue describes it: 8 GCDs and 4 NICs each, groups of 128 nodes."""
    return Topology.of_platform(load_platform("frontier"), nodes * 8)

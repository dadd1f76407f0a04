"""Node-level plans: few large messages between nodes, everything else inside them. They differ in who carries what."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pipermoe.exchange.builders.direct import group_interleaved
from pipermoe.exchange.builders.relay import Pieces, cut_node_pairs, relay
from pipermoe.exchange.plan import ExchangePlan, Ints, byte_matrix
from pipermoe.exchange.topology import Topology


def hierarchical(
    counts: ArrayLike, topology: Topology, *, chunk_bytes: int = 0, separate_inside: bool = False
) -> ExchangePlan:
    """One message per ordered pair of nodes; the ranks of a node take turns in carrying (node-aware, multi-leader).

    The fewest messages that cross, so the lowest cost where messages are small. From node i to node j rank j mod R of
    node i sends to rank i mod R of node j (Bienz et al.; HALO's packing, arXiv 2605.05049).
    """
    counts = byte_matrix(counts)
    pieces = cut_node_pairs(counts, topology, np.ones((topology.num_nodes,) * 2, dtype=np.int64), chunk_bytes)
    i, j = topology.node_of[pieces.source], topology.node_of[pieces.destination]
    ranks = topology.ranks_of_node
    a = _each(i, j, lambda i, j: ranks[i][j % len(ranks[i])])
    b = _each(i, j, lambda i, j: ranks[j][i % len(ranks[j])])
    step = _chunked_step(topology, pieces, i, j, chunk=pieces.cut)
    return relay(
        "hierarchical", counts, topology, pieces, (a, b), step, separate_inside=separate_inside or chunk_bytes > 0
    )


def one_leader(counts: ArrayLike, topology: Topology) -> ExchangePlan:
    """All that a node sends and receives, inside it as well, passes its first rank: the fewest messages of all.

    For a few bytes on ranks that share processor cores, where every message wakes someone up: 2 (R - 1) messages inside
    a node and N - 1 that leave it. HetuMoE's hierarchical all-to-all.
    """
    counts = byte_matrix(counts)
    once = np.ones((topology.num_nodes,) * 2, dtype=np.int64)
    pieces = cut_node_pairs(counts, topology, once, with_inside=True)
    i, j = topology.node_of[pieces.source], topology.node_of[pieces.destination]
    first = np.array([ranks[0] for ranks in topology.ranks_of_node])
    step = _chunked_step(topology, pieces, i, j, chunk=np.zeros_like(i))
    carrier = (first[i], first[j])
    return relay("one_leader", counts, topology, pieces, carrier, step, separate_inside=False, inside="carried")


def nic_balanced(counts: ArrayLike, topology: Topology, *, chunk_bytes: int = 0) -> ExchangePlan:
    """Every pair of nodes cuts its bytes evenly over their NICs, whichever devices they belong to.

    So a NIC carries 1/K of its node's bytes however skewed the counts are (FAST, arXiv 2505.09764). With `chunk_bytes`
    the parts travel in chunks: a chunk crosses while the next is being gathered and the one before is being scattered.
    """
    counts = byte_matrix(counts)
    lanes = _lanes(topology)
    pieces = cut_node_pairs(counts, topology, lanes, chunk_bytes)
    i, j = topology.node_of[pieces.source], topology.node_of[pieces.destination]
    cuts = _cuts_per_pair(pieces, i, j, topology.num_nodes)
    chunks = cuts // lanes[i, j]
    lane, chunk = np.divmod(pieces.cut, chunks)
    nics = topology.nics_of_node
    a = _each(i, j, lambda i, j, n: topology.carrier(i, nics[i][n % len(nics[i])], j), lane)
    b = _each(i, j, lambda i, j, n: topology.carrier(j, nics[j][n % len(nics[j])], i), lane)
    return relay("nic_balanced", counts, topology, pieces, (a, b), _chunked_step(topology, pieces, i, j, chunk))


def mirrored(counts: ArrayLike, topology: Topology) -> ExchangePlan:
    """What goes to a rank of another node crosses from the rank with the same index here: no scatter.

    Tutel's two-dimensional hierarchical all-to-all, the rails of NCCL's PXN.
    """
    counts = byte_matrix(counts)
    pieces = cut_node_pairs(counts, topology, np.ones((topology.num_nodes,) * 2, dtype=np.int64))
    i, j = topology.node_of[pieces.source], topology.node_of[pieces.destination]
    ranks, index = topology.ranks_of_node, topology.local_index
    a = _each(i, pieces.destination, lambda i, d: ranks[i][index[d] % len(ranks[i])])
    step = _chunked_step(topology, pieces, i, j, chunk=np.zeros_like(i))
    return relay("mirrored", counts, topology, pieces, (a, pieces.destination), step)


def _lanes(topology: Topology) -> Ints:
    """How many NICs a pair of nodes uses: as many as the richer of the two has, [N, N]."""
    nics = np.array([len(nics) for nics in topology.nics_of_node], dtype=np.int64)
    return np.maximum(nics[:, None], nics[None, :])


def _cuts_per_pair(pieces: Pieces, i: Ints, j: Ints, nodes: int) -> Ints:
    """For every piece the number of cuts of its node pair: chunks make it a multiple of the lanes."""
    most = np.zeros((nodes, nodes), dtype=np.int64)
    np.maximum.at(most, (i, j), pieces.cut + 1)
    return most[i, j]


def _each(first: Ints, second: Ints, choose, third: Ints | None = None) -> Ints:
    """`choose` for every distinct combination of the columns, spread back over all entries."""
    columns = np.stack([first, second] if third is None else [first, second, third])
    distinct, back = np.unique(columns, axis=1, return_inverse=True)
    return np.array([choose(*column) for column in distinct.T.tolist()], dtype=np.int64)[back.ravel()]


def _chunked_step(topology: Topology, pieces: Pieces, i: Ints, j: Ints, chunk: Ints) -> Ints:
    """First the first chunks, each time over the nodes in the order that keeps all global links busy."""
    order = group_interleaved(np.array(topology.group, dtype=np.int64))
    return chunk * (int(order.max()) + 1) + order[i, j]

"""Dispatch without redundancy: a token crosses to a node once, however many of its experts live there.

    x --cross--> carriers, one copy per (token, node) --fan out inside the node--> ranks --expand--> one row per expert

Combine is the transpose: rows are summed per rank, then per node, and one sum per (token, node) crosses back. Compare
X-MoE's redundancy-bypassing dispatch (arXiv 2508.13337) and DeepEP.

Rows arrive as those of a plain dispatch do, ordered by (source rank, expert, token, choice), and with the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipermoe.exchange.plan import Ints
from pipermoe.exchange.topology import Topology


@dataclass(frozen=True, eq=False)
class DispatchPlan:
    """What one rank does; the split matrices [P, P] count rows and are equal on all ranks.

    T tokens of this rank, C copies that it sends across, B rows that it holds then (those received, then its own
    tokens), F copies that it fans out, G rows that it receives from its node, N rows in all for its experts.
    """

    rank: int
    num_tokens: int
    cross_index: Ints  # [C] token of every copy, ordered by carrier
    cross_splits: Ints  # [P, P] copies from source to carrier
    fan_index: Ints  # [F] which of the B rows goes out, ordered by rank
    fan_splits: Ints  # [P, P] rows from holder to rank, inside nodes
    expand_index: Ints  # [N] which of the G rows every expert row is
    row_expert: Ints  # [N]
    choice_index: Ints  # [T * K] this rank's choices (token * K + choice) ordered by (rank, expert, token, choice)
    choice_splits: Ints  # [P, P] choices from source to rank: the rows of a plain dispatch

    @property
    def rows_held(self) -> int:
        return int(self.cross_splits[:, self.rank].sum()) + self.num_tokens


@dataclass(frozen=True, slots=True)
class Savings:
    """Rows that cross nodes in one dispatch: per choice (plain), per rank, and per node (this dispatch)."""

    per_choice: int
    per_rank: int
    per_node: int

    @property
    def factor(self) -> float:
        return self.per_choice / max(self.per_node, 1)


def plan_dispatch(experts: Sequence[Ints], expert_rank: Ints, topology: Topology, rank: int) -> DispatchPlan:
    """The part of `rank`. `experts[s]` is [T_s, K], the experts chosen by the tokens of rank s; -1 chooses none.

    A copy from rank s to node j is carried by a rank of j in turn, so all NICs of j receive alike.
    """
    size, node = topology.num_ranks, topology.node_of
    s, t, k, e = _choices(experts)
    d = expert_rank[e]
    order = np.lexsort((k, t, e, d, s))
    s, t, k, e, d = (column[order] for column in (s, t, k, e, d))
    width = experts[rank].shape[1]
    tokens = max((len(table) for table in experts), default=0)

    # one copy per (source, node, token); at home the source itself holds the row
    copies, copy_of = np.unique((s * topology.num_nodes + node[d]) * tokens + t, return_inverse=True)
    copy_pair, copy_token = np.divmod(copies, max(tokens, 1))
    copy_source, copy_node = np.divmod(copy_pair, topology.num_nodes)
    away = copy_node != node[copy_source]
    holder = np.where(away, _carriers(topology, copy_node, copy_pair), copy_source)
    cross_splits = _count(size, copy_source[away], holder[away])
    sent = np.flatnonzero(away & (copy_source == rank))
    sent = sent[np.lexsort((copy_token[sent], holder[sent]))]

    # where a holder keeps a copy: those received lie by (source, token), its own tokens behind them
    position = copy_token + cross_splits.sum(axis=0)[holder]
    received = np.flatnonzero(away)
    received = received[np.lexsort((copy_token[received], copy_source[received], holder[received]))]
    position[received] = _place_in_runs(holder[received])

    # one row per (copy, rank)
    fans, fan_of = np.unique(copy_of * size + d, return_inverse=True)
    fan_copy, fan_rank = np.divmod(fans, size)
    fan_holder = holder[fan_copy]
    fan_order = np.lexsort((copy_token[fan_copy], copy_source[fan_copy], fan_rank, fan_holder))
    arrival = np.empty(len(fans), dtype=np.int64)
    by_rank = np.lexsort((copy_token[fan_copy], copy_source[fan_copy], fan_holder, fan_rank))
    arrival[by_rank] = _place_in_runs(fan_rank[by_rank])
    mine = fan_order[fan_holder[fan_order] == rank]

    here, own = np.flatnonzero(d == rank), np.flatnonzero(s == rank)
    return DispatchPlan(
        rank,
        len(experts[rank]),
        copy_token[sent],
        cross_splits,
        position[fan_copy[mine]],
        _count(size, fan_holder, fan_rank),
        arrival[fan_of[here]],
        e[here],
        t[own] * width + k[own],
        _count(size, s, d),
    )


def savings(experts: Sequence[Ints], expert_rank: Ints, topology: Topology) -> Savings:
    """How many rows cross nodes, by how much is removed."""
    node = topology.node_of
    s, t, _, e = _choices(experts)
    d = expert_rank[e]
    away = node[s] != node[d]
    s, t, d = s[away], t[away], d[away]
    distinct = [len(np.unique(np.stack([s, t, to]), axis=1).T) for to in (d, node[d])]
    return Savings(int(away.sum()), *distinct)


def _choices(experts: Sequence[Ints]) -> tuple[Ints, Ints, Ints, Ints]:
    """(source, token, choice, expert) of every choice of all ranks."""
    columns = []
    for source, table in enumerate(experts):
        token, choice = np.nonzero(table >= 0)
        columns.append((np.full(len(token), source), token, choice, table[token, choice]))
    s, t, k, e = (np.concatenate(column).astype(np.int64) for column in zip(*columns, strict=True))
    return s, t, k, e


def _carriers(topology: Topology, copy_node: Ints, copy_pair: Ints) -> Ints:
    """For the copies, sorted by (source, node), the ranks of their node in turn."""
    turn = _place_in_runs(copy_pair)
    carrier = np.zeros_like(copy_node)
    for j, ranks in enumerate(topology.ranks_of_node):
        here = copy_node == j
        carrier[here] = np.array(ranks)[turn[here] % len(ranks)]
    return carrier


def _place_in_runs(label: Ints) -> Ints:
    """0, 1, 2, ... inside every run of equal labels; equal labels lie together."""
    starts = np.ones(len(label), dtype=bool)
    starts[1:] = label[1:] != label[:-1]
    first = np.flatnonzero(starts)
    return np.arange(len(label)) - np.repeat(first, np.diff(np.append(first, len(label))))


def _count(size: int, source: Ints, destination: Ints) -> Ints:
    return np.bincount(source * size + destination, minlength=size * size).reshape(size, size).astype(np.int64)

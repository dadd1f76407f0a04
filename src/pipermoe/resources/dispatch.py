"""What travels in a dispatch when the routing is given as counts: which token chooses what, and how many copies of it.

P ranks of an expert group, S of them with different counts, E experts, T tokens of a micro-batch on one rank, K choices
of a token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

PLANNED_ORDER_SEED = 0


def planned_choices(counts_E: Sequence[int], tokens: int, top_k: int) -> NDArray[np.int64]:
    """Choices (T, K) by which `counts_E[e]` of one rank's assignments fall on expert e, no expert twice on a token.

    Experts are dealt to the tokens column by column in a fixed random order, so that the K experts of a token lie on
    about as many ranks as under independent routing. No count may exceed T.
    """
    order_E = _dealing_order(len(counts_E))
    experts_A = np.repeat(order_E, np.asarray(counts_E)[order_E])
    return np.ascontiguousarray(experts_A.reshape(top_k, tokens).T)


def planned_copies(
    counts_PE: ArrayLike, tokens: int, top_k: int, capacity: int | None = None, blocks: int = 0
) -> NDArray[np.int64]:
    """Rows (P source, P destination) of a deduplicated dispatch of `planned_choices`: one per token and rank.

    With `blocks` (N) the experts lie in so many blocks of ranks, and the result is (P, N): one per token and block.
    With a `capacity` each expert takes its first so many assignments of each source, in the order of tokens.
    """
    counts_PE = np.array(counts_PE, dtype=np.int64)
    ranks, experts = counts_PE.shape
    blocks = blocks or ranks
    number: dict[bytes, int] = {}
    which_P = [number.setdefault(bytes(counts_E), len(number)) for counts_E in counts_PE]  # alike sources send alike
    copies_SN = np.zeros((len(number), blocks), dtype=np.int64)
    for source in range(len(number)):
        counts_E = counts_PE[which_P.index(source)]
        choices_A = planned_choices(counts_E, tokens, top_k).ravel()
        token_A = np.repeat(np.arange(tokens), top_k)
        if capacity is not None:
            order = np.argsort(choices_A, kind="stable")
            first_E = np.cumsum(counts_E) - counts_E
            kept = order[np.arange(len(order)) - first_E[choices_A[order]] < capacity]
            choices_A, token_A = choices_A[kept], token_A[kept]
        goes_TN = np.zeros((tokens, blocks), dtype=bool)
        goes_TN[token_A, choices_A // (experts // blocks)] = True
        copies_SN[source] = goes_TN.sum(0)
    return copies_SN[which_P]


def balanced(rows: int, experts: int, sources: int) -> NDArray[np.int64]:
    """Counts (P, E) as even as whole rows can be, by source and over all sources: the rest goes round the experts."""
    base, left = divmod(rows, experts)
    ends_P = left * np.arange(1, sources + 1)[:, None]
    turn_PE = (np.arange(experts)[None] - (ends_P - left)) % experts
    return base + (turn_PE < left).astype(np.int64)


def skewed(rows: int, top_k: int, experts: int, ranks: int, imbalance: float, busiest: int) -> NDArray[np.int64]:
    """Counts (P, E) where all ranks choose alike and the experts of one get `imbalance` times their even share.

    All other experts share the rest evenly; `imbalance` 1 is `balanced`.
    """
    if imbalance == 1:
        return balanced(rows, experts, ranks)
    held = experts // ranks
    own = min(round(rows * imbalance / ranks), rows // top_k * held)
    counts_E = np.insert(_evenly(rows - own, experts - held), busiest * held, _evenly(own, held))
    return np.tile(counts_E, (ranks, 1))


def _evenly(rows: int, experts: int) -> NDArray[np.int64]:
    """Counts (E) as even as whole rows can be."""
    return rows // experts + (np.arange(experts) < rows % experts)


def _other_share(imbalance: float, ranks: int) -> float:
    """Of every rank but the busiest, over the mean."""
    return max(0.0, (ranks - imbalance) / (ranks - 1))


@lru_cache
def skewed_copies(
    rows: int,
    top_k: int,
    experts: int,
    ranks: int,
    capacity_factor: float,
    imbalance: float = 1.0,
    ranks_per_copy: int = 1,
) -> NDArray[np.int64]:
    """`planned_copies` of `rows` choices of every rank, as `skewed` towards the first one."""
    capacity = ceil(capacity_factor * rows / experts) if capacity_factor else None
    counts_PE = skewed(rows, top_k, experts, ranks, imbalance, 0)
    return planned_copies(counts_PE, rows // top_k, top_k, capacity, ranks // ranks_per_copy)


@dataclass(frozen=True, slots=True)
class Hops:
    """What a rank sends to others in a deduplicated dispatch and receives from them, one array (P,) each: copies across
    nodes and inside its own, and rows (choices) inside its own. Where every rank is a node of its own none is inside.
    """

    copies_out: Any
    copies_in: Any
    inside_out: Any
    inside_in: Any
    rows_out: Any
    rows_in: Any


@lru_cache
def planned_hops(
    rows: int,
    top_k: int,
    experts: int,
    ranks: int,
    ranks_per_copy: int,
    capacity_factor: float,
    imbalance: float = 1.0,
    busiest: int = 0,
) -> Hops:
    """Of `rows` choices of every rank (`skewed`). Copies cross to the rank at the same place, which passes them on."""
    capacity = ceil(capacity_factor * rows / experts) if capacity_factor else rows
    nodes, counts_PE = ranks // ranks_per_copy, skewed(rows, top_k, experts, ranks, imbalance, busiest)
    choices_PP = np.minimum(counts_PE, capacity).reshape(ranks, ranks, -1).sum(2)
    copies_PP, copies_PN = (
        planned_copies(counts_PE, rows // top_k, top_k, capacity, blocks) for blocks in (ranks, nodes)
    )
    crossing_NNL = copies_PN.reshape(nodes, ranks_per_copy, nodes).transpose(0, 2, 1)  # from, to, place on both
    away_NN1 = ~np.eye(nodes, dtype=bool)[..., None]
    found = [(crossing_NNL * away_NN1).sum(axis) for axis in (1, 0)]
    for moved_PP in (copies_PP, choices_PP):
        passed_LNL = moved_PP.reshape(nodes, ranks_per_copy, nodes, ranks_per_copy).sum(0)  # from place, node, to place
        passed_LNL = passed_LNL * ~np.eye(ranks_per_copy, dtype=bool)[:, None]
        found += [passed_LNL.sum(2).T, passed_LNL.sum(0)]
    return Hops(*(each.ravel() for each in found))


def expected_hops(
    rows: float,
    top_k: int,
    experts: int,
    ranks: int,
    ranks_per_copy: int,
    capacity_factor: float,
    imbalance: float = 1.0,
) -> Hops:
    """Of the busiest rank if tokens choose independently; with `imbalance` 1 of any, which receives what it sends."""
    nodes, tokens, other = ranks // ranks_per_copy, rows / top_k, _other_share(imbalance, ranks)
    beside, passed = ranks_per_copy - 1, kept_rows(rows, experts, capacity_factor) / ranks_per_copy

    def chosen(share: float) -> float:
        return chance_to_be_chosen(experts, top_k, share / ranks)

    own_node = imbalance + beside * other
    return Hops(
        copies_out=tokens * (nodes - 1) * chosen(ranks_per_copy * other),
        copies_in=tokens * (nodes - 1) * chosen(own_node),
        inside_out=tokens * nodes * beside * chosen(other),
        inside_in=tokens * nodes * beside * chosen(imbalance),
        rows_out=passed * beside * other,
        rows_in=passed * beside * imbalance,
    )


def kept_rows(rows: Any, experts: int, capacity_factor: float) -> Any:
    """Of `rows` balanced choices of one micro-batch those that travel; nothing is padded.

    An expert takes its even share times the factor, rounded up (GShard, arXiv 2006.16668, section 2.2); 0: all.
    """
    if not capacity_factor:
        return rows
    return np.minimum(rows, experts * np.ceil(capacity_factor * rows / experts).astype(np.int64))


def expected_copies_per_token(num_experts: int, top_k: int, ranks: int) -> float:
    """Ranks, or nodes, on which a token's experts lie, when all sets of K experts are equally likely: rows of a
    deduplicated dispatch per token, of a plain one K.

    P (1 - C(E - E/P, K) / C(E, K)): the mean number of ranks that a draw without replacement touches.
    """
    return ranks * chance_to_be_chosen(num_experts, top_k, 1 / ranks)


def chance_to_be_chosen(num_experts: int, top_k: int, share: float) -> float:
    """That one of a token's K different experts lies on a rank that gets this `share` of all choices.

    1 - C(E - s E, K) / C(E, K), as though the rank held s E of E equally popular experts, a whole number or not.
    """
    elsewhere = num_experts * (1 - share)
    return 1 - prod(max(0.0, elsewhere - drawn) / (num_experts - drawn) for drawn in range(top_k))


@lru_cache
def _dealing_order(num_experts: int) -> NDArray[np.int64]:
    return np.random.default_rng(PLANNED_ORDER_SEED).permutation(num_experts)

"""Copies onto ranks: longest first, then swaps. All layers at once.

A copy is an item with a weight (its rows) and an expert. Two copies of one expert on a rank are legal but useless, so
they are placed together only where nothing else is free.
"""

# L MoE layers, I items, N ranks, S slots of a rank, E logical experts

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import EMPTY, count_copies
from pipermoe.layout.policy import Nodes
from pipermoe.layout.replicas import greedy_copies

FORBIDDEN = 1e30  # rows; more than any load, and less than a full rank's infinity


def items_of(copies_LE: NDArray[np.int64]) -> NDArray[np.int64]:
    """The experts of all copies of each layer, heavy or not in ascending order, (L, I); the layers have equal I."""
    layers, experts = copies_LE.shape
    return np.repeat(np.tile(np.arange(experts), layers), copies_LE.ravel()).reshape(layers, -1)


def heaviest_first(copies_LI: NDArray[np.int64], size_LE: NDArray) -> NDArray[np.int64]:
    """The experts of all copies, (L, I), in the order of their size; ties go to the one that came first."""
    order_LI = np.argsort(-np.take_along_axis(size_LE, copies_LI, axis=1), axis=1, kind="stable")
    return np.take_along_axis(copies_LI, order_LI, axis=1)


def longest_first(experts_LI: NDArray[np.int64], size_LE: NDArray, ranks: int, slots: int) -> NDArray[np.int64]:
    """Slots (L, N, S): the heaviest copy first, each to the least loaded rank with room (Graham 1969, LPT).

    `size_LE` is the rows of one copy of each expert. Ties go to the lower expert and the lower rank.
    """
    layers, items = experts_LI.shape
    if items > ranks * slots:
        raise ValueError(f"{items} copies need more than {ranks} ranks of {slots} slots")
    rows = np.arange(layers)
    table = np.full((layers, ranks, slots), EMPTY, dtype=np.int64)
    held = np.zeros((layers, size_LE.shape[1], ranks))  # FORBIDDEN where the rank has a copy of the expert
    load, used = np.zeros((layers, ranks)), np.zeros((layers, ranks), dtype=np.int64)
    for expert in heaviest_first(experts_LI, size_LE).T:
        rank = (load + held[rows, expert]).argmin(1)
        place = used[rows, rank]
        table[rows, rank, place] = expert
        held[rows, expert, rank] = FORBIDDEN
        load[rows, rank] += np.where(place + 1 == slots, np.inf, size_LE[rows, expert])
        used[rows, rank] += 1
    return table


def pack_in_nodes(node_LE: NDArray[np.int64], load_LE: NDArray, nodes: Nodes, slots: int) -> NDArray[np.int64]:
    """Slots (L, N, S): each node's experts, equally many on each, copied and packed longest first on its own ranks."""
    layers, ranks = len(load_LE), nodes.ranks_per_node
    table = np.empty((layers, nodes.ranks, slots), dtype=np.int64)
    for node in range(nodes.count):
        experts_LI = np.nonzero(node_LE == node)[1].reshape(layers, -1)
        load = np.take_along_axis(load_LE, experts_LI, axis=1)
        copies = greedy_copies(load, ranks * slots)
        local = longest_first(items_of(copies), load / copies, ranks, slots)
        table[:, node * ranks : (node + 1) * ranks] = np.take_along_axis(experts_LI[:, None], local, axis=2)
    return table


@dataclass(frozen=True, slots=True)
class Search:
    """Which exchanges are looked at: the `hottest` ranks, each with `partners` cold ranks of its own, `rounds` times.

    One of each is the paper's hill climbing; more partners find more, more hot ranks at once are quicker.
    """

    rounds: int
    hottest: int = 1
    partners: int = 1


def swap_down(
    slots_LNS: NDArray[np.int64], size_LE: NDArray, search: Search, *, enough: float = 1.0
) -> NDArray[np.int64]:
    """Lower every layer's busiest ranks by exchanging one of their slots with one of a colder rank, best pair first.

    A layer stops when no exchange lowers the busier of its two ranks, or at imbalance `enough`.
    """
    layers, ranks, _ = slots_LNS.shape
    hottest = min(search.hottest, ranks // 2)
    partners = min(search.partners, ranks // hottest - 1) if hottest else 0
    if not partners:
        return slots_LNS
    empty = size_LE.shape[1]  # an empty slot is the expert after the last: it weighs nothing and may be anywhere twice
    slots = np.where(slots_LNS == EMPTY, empty, slots_LNS)
    weight = np.take_along_axis(np.concatenate([size_LE, np.zeros((layers, 1))], axis=1)[:, None], slots, axis=2)
    small = count_copies(slots_LNS, empty).astype(np.int8)  # as it is read at random
    copies = np.pad(small, ((0, 0), (0, 0), (0, 1)))
    active = np.arange(layers)
    for _ in range(search.rounds):
        load = weight[active].sum(2)
        uneven = load.max(1) > enough * load.mean(1)
        if not uneven.any():
            break
        active = active[uneven]
        swaps = _best_swaps(active, slots, weight, copies, load[uneven], hottest, partners)
        layer, hot, here, cold, there = swaps
        active = np.unique(layer)
        mine, theirs = slots[layer, hot, here], slots[layer, cold, there]
        for rank, gone, come in ((hot, mine, theirs), (cold, theirs, mine)):
            copies[layer, rank, gone] -= 1
            copies[layer, rank, come] += 1
            copies[layer, rank, empty] = 0
        for table in (slots, weight):
            table[layer, hot, here], table[layer, cold, there] = table[layer, cold, there], table[layer, hot, here]
    return np.where(slots == empty, EMPTY, slots)


def _best_swaps(
    active: NDArray, slots: NDArray, weight: NDArray, copies: NDArray, load: NDArray, hottest: int, partners: int
) -> tuple[NDArray, ...]:
    """(layer, rank, slot, rank, slot) of the best exchange of each hot rank, where it lowers the busier of the two.

    With a gap between two ranks, moving w rows to the colder changes the busier one's load by |w - gap / 2| - gap / 2.
    """
    order = np.argsort(load, axis=1, kind="stable")
    hot = order[:, : -hottest - 1 : -1]  # (layers, hottest)
    cold = order[:, : hottest * partners].reshape(len(active), partners, hottest).transpose(0, 2, 1)
    layer = active[:, None, None]
    half_gap = (np.take_along_axis(load, hot, 1)[..., None] - load[np.arange(len(active))[:, None, None], cold]) / 2
    mine, theirs = slots[layer[..., 0], hot], slots[layer, cold]
    taken = copies[layer[..., None], cold[..., None], mine[:, :, None]] > 0  # the partner has what it would get
    given = copies[layer[..., None], hot[:, :, None, None], theirs] > 0
    out = weight[layer[..., 0], hot][:, :, None] - half_gap[..., None] + FORBIDDEN * taken
    back = weight[layer, cold] - FORBIDDEN * given
    change = np.abs(out[..., None, :] - back[..., None])  # (layers, hottest, partners, their slot, own slot)
    change -= half_gap[..., None, None]
    flat = change.reshape(*hot.shape, -1)
    best = flat.argmin(2)
    chosen = np.nonzero(np.take_along_axis(flat, best[..., None], 2)[..., 0] < -1e-9 * load.max(1, keepdims=True))
    partner, there, here = np.unravel_index(best[chosen], change.shape[2:])
    where = (chosen[0], chosen[1], partner)
    return active[chosen[0]], hot[chosen], here, cold[where], there

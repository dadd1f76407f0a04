"""Copies onto ranks: longest first, then swaps. All layers at once.

A copy is an item with a weight (its rows) and an expert. Two copies of one expert on a rank are legal but useless, so
they are placed together only where nothing else is free.
"""

# L MoE layers, I items, N ranks, S slots of a rank, E logical experts

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import EMPTY


def items_of(copies_LE: NDArray[np.int64]) -> NDArray[np.int64]:
    """The experts of all copies of each layer, heavy or not in ascending order, (L, I); the layers have equal I."""
    layers, experts = copies_LE.shape
    return np.repeat(np.tile(np.arange(experts), layers), copies_LE.ravel()).reshape(layers, -1)


def longest_first(experts_LI: NDArray[np.int64], size_LE: NDArray, ranks: int, slots: int) -> NDArray[np.int64]:
    """Slots (L, N, S): the heaviest copy first, each to the least loaded rank with room (Graham 1969, LPT).

    `size_LE` is the rows of one copy of each expert. Ties go to the lower expert and the lower rank.
    """
    layers, items = experts_LI.shape
    rows = np.arange(layers)
    weight_LI = np.take_along_axis(size_LE, experts_LI, axis=1)
    order = np.argsort(-weight_LI, axis=1, kind="stable")
    table = np.full((layers, ranks, slots), EMPTY, dtype=np.int64)
    held = np.zeros((layers, ranks, size_LE.shape[1]), dtype=bool)
    load, used = np.zeros((layers, ranks)), np.zeros((layers, ranks), dtype=np.int64)
    for i in range(items):
        item = order[:, i]
        expert = experts_LI[rows, item]
        room = used < slots
        fresh = room & ~held[rows, :, expert]
        allowed = np.where(fresh.any(1, keepdims=True), fresh, room)
        rank = np.where(allowed, load, np.inf).argmin(1)
        table[rows, rank, used[rows, rank]] = expert
        held[rows, rank, expert] = True
        load[rows, rank] += weight_LI[rows, item]
        used[rows, rank] += 1
    return table


def swap_down(
    slots_LNS: NDArray[np.int64], size_LE: NDArray, *, rounds: int, partners: int, enough: float = 1.0
) -> NDArray[np.int64]:
    """Lower every layer's busiest rank by exchanging one of its slots with a slot of another rank, best pair first.

    The others are the `partners` least loaded ranks: 1 is the paper's hill climbing, more find more. At most `rounds`
    swaps a layer; a layer stops when no swap lowers the busier of the two, or at imbalance `enough`.
    """
    slots = slots_LNS.copy()
    size = np.concatenate([size_LE, np.zeros((len(size_LE), 1))], axis=1)  # an empty slot weighs nothing
    weight = np.take_along_axis(size[:, None], slots % size.shape[1], axis=2)
    active = np.arange(len(slots))
    for _ in range(rounds):
        load = weight[active].sum(2)
        peak = load.max(1)
        reached, swap = _best_swap(slots[active], weight[active], load, min(partners, load.shape[1] - 1))
        better = (reached < peak * (1 - 1e-9)) & (peak > enough * load.mean(1))
        active, (hot, here, cold, there) = active[better], (index[better] for index in swap)
        if not len(active):
            break
        for table in (slots, weight):
            mine, other = table[active, hot, here], table[active, cold, there]
            table[active, hot, here], table[active, cold, there] = other, mine
    return slots


def _best_swap(slots: NDArray, weight: NDArray, load: NDArray, partners: int) -> tuple[NDArray, tuple[NDArray, ...]]:
    """Of each layer's best swap: the load of the busier of the two ranks afterwards, and (rank, slot, rank, slot)."""
    layers, _, width = slots.shape
    rows = np.arange(layers)
    order = np.argsort(load, axis=1, kind="stable")
    hot, cold = order[:, -1], order[:, :partners]
    mine = slots[rows, hot][:, None, None, :]
    theirs = slots[rows[:, None], cold][..., None]
    moved = weight[rows, hot][:, None, None, :] - weight[rows[:, None], cold][..., None]  # leaves the busiest rank
    peak = np.maximum(load[rows, hot][:, None, None, None] - moved, load[rows[:, None], cold][..., None, None] + moved)
    same = (theirs == mine) & (mine != EMPTY)
    peak[same.any(2)[:, :, None, :] | same.any(3)[..., None]] = np.inf  # one of the two has what it would get
    flat = peak.reshape(layers, -1)
    best = flat.argmin(1)
    partner, there, here = np.unravel_index(best, (partners, width, width))
    return flat[rows, best], (hot, here, cold[rows, partner], there)

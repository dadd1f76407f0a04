"""FlexMoE (SIGMOD 2023): a few adjustments at a time, each a copy more of the hottest expert for one of the idlest."""

# N ranks, S slots of a rank, E logical experts; one layer

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import EMPTY, ExpertLayout
from pipermoe.layout.load import imbalance, rank_load, slot_load
from pipermoe.layout.policy import Nodes


@dataclass(frozen=True, slots=True)
class ExpandShrink:
    """Where a layer's imbalance is above `threshold`, at most `rounds` times: the expert whose copies are the largest
    gets another, in an empty slot or in that of the expert whose copies stay the smallest without it.

    Kept only while the busiest rank gets fewer rows. The paper's third adjustment, migrating copies so that fewer ranks
    sum a gradient, is not made.
    """

    threshold: float = 1.05
    rounds: int = 10

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        slots_LNS = layout.slots_LNS.copy()
        for layer in np.flatnonzero(imbalance(rank_load(layout, load_LE)) > self.threshold):
            for _ in range(self.rounds):
                if not _adjust(slots_LNS[layer], load_LE[layer]):
                    break
        return layout.successor(slots_LNS)


def _adjust(slots_NS: NDArray[np.int64], load_E: NDArray) -> bool:
    """Make the best expansion in place; whether there was one."""
    copies_E = np.bincount(slots_NS[slots_NS != EMPTY], minlength=len(load_E))
    without_E = np.where(copies_E > 1, load_E / np.maximum(copies_E - 1, 1), np.inf)  # size of copies with one fewer
    hottest, idlest = int((load_E / copies_E).argmax()), int(without_E.argmin())
    idle = (slots_NS == EMPTY) | ((slots_NS == idlest) & np.isfinite(without_E[idlest]) & (idlest != hottest))
    places = np.argwhere(idle & ~(slots_NS == hottest).any(1, keepdims=True))
    if not len(places):
        return False
    peaks = [_peak(slots_NS, load_E, copies_E, tuple(place), hottest) for place in places]
    best = int(np.argmin(peaks))
    if peaks[best] >= slot_load(slots_NS, load_E / copies_E).sum(1).max() * (1 - 1e-9):
        return False
    slots_NS[tuple(places[best])] = hottest
    return True


def _peak(slots_NS: NDArray, load_E: NDArray, copies_E: NDArray, place: tuple[int, int], expert: int) -> float:
    """Rows of the busiest rank once `place` holds `expert`."""
    after_NS, after_E = slots_NS.copy(), copies_E.copy()
    if slots_NS[place] != EMPTY:
        after_E[slots_NS[place]] -= 1
    after_E[expert] += 1
    after_NS[place] = expert
    return float(slot_load(after_NS, load_E / after_E).sum(1).max())

"""Incremental: repair the layout that there is with as few moved copies as possible.

After a small drift of the load nearly every copy is still where it should be: from-scratch planners move all of them,
this one a handful.
"""

# N ranks, S slots of a rank, E logical experts; one layer

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import EMPTY, ExpertLayout
from pipermoe.layout.load import imbalance, rank_load, slot_load
from pipermoe.layout.policies.balanced import Balanced
from pipermoe.layout.policy import Nodes


@dataclass(frozen=True, slots=True)
class Incremental:
    """Moves copies until every layer's imbalance is at most `target`, at most `budget` copies in a layer.

    Each step relieves the busiest rank by the action that lowers the peak most per copy moved: exchange one of its
    copies with another rank's (two moves; one into an empty slot), or give one of its experts another copy in the place
    of a redundant one elsewhere (one move). A layer that stays above `rebuild_above` all the same is planned from
    scratch, whatever that moves: the first layout of a run, or a load that has turned around.
    """

    target: float = 1.05
    budget: int = 64
    rebuild_above: float = 1.25

    def plan(self, layout: ExpertLayout, load_LE: NDArray, nodes: Nodes) -> ExpertLayout:
        slots_LNS = layout.slots_LNS.copy()
        for layer, load_E in enumerate(load_LE.astype(float)):
            _repair(slots_LNS[layer], load_E, self.target, self.budget)
        repaired = layout.successor(slots_LNS)
        short = imbalance(rank_load(repaired, load_LE)) > self.rebuild_above
        if not short.any():
            return repaired
        rebuilt = Balanced().plan(layout, load_LE, nodes)
        better = short & (rank_load(rebuilt, load_LE).max(1) < rank_load(repaired, load_LE).max(1))
        return layout.successor(np.where(better[:, None, None], rebuilt.slots_LNS, repaired.slots_LNS))


def _repair(slots_NS: NDArray[np.int64], load_E: NDArray, target: float, budget: int) -> None:
    """Change one layer in place."""
    copies_E = np.bincount(slots_NS[slots_NS != EMPTY], minlength=len(load_E))
    moved = 0
    while moved < budget:
        weight_NS = slot_load(slots_NS, load_E / copies_E)
        load_N = weight_NS.sum(1)
        if load_N.max() <= target * load_N.mean():
            return
        actions = [_best_exchange(slots_NS, weight_NS, load_N), _best_copy(slots_NS, load_E, copies_E, load_N)]
        allowed = [action for action in actions if action.gain > 1e-9 * load_N.max() and moved + action.moves <= budget]
        if not allowed:
            return
        best = max(allowed, key=lambda action: action.gain / action.moves)
        for (rank, slot), expert in best.changes:
            if slots_NS[rank, slot] != EMPTY:
                copies_E[slots_NS[rank, slot]] -= 1
            if expert != EMPTY:
                copies_E[expert] += 1
        for (rank, slot), expert in best.changes:
            slots_NS[rank, slot] = expert
        moved += best.moves


@dataclass(frozen=True, slots=True)
class _Action:
    """`gain` rows less on the busiest of the ranks concerned, `moves` copies that travel, new contents of slots."""

    gain: float
    moves: int
    changes: tuple[tuple[tuple[int, int], int], ...]


def _best_exchange(slots_NS: NDArray, weight_NS: NDArray, load_N: NDArray) -> _Action:
    hot = int(load_N.argmax())
    mine = slots_NS[hot]
    moved = weight_NS[hot] - weight_NS[..., None]  # (N, S, S): what leaves the busiest rank
    peak = np.maximum(load_N[hot] - moved, load_N[:, None, None] + moved)
    same = (slots_NS[..., None] == mine) & (mine != EMPTY)
    peak[same.any(1)[:, None, :] | same.any(2)[..., None]] = np.inf
    peak[hot] = np.inf
    rank, there, here = np.unravel_index(peak.argmin(), peak.shape)
    theirs, own = int(slots_NS[rank, there]), int(mine[here])
    return _Action(
        gain=float(load_N[hot] - peak[rank, there, here]),
        moves=int(theirs != EMPTY) + int(own != EMPTY),
        changes=(((int(rank), int(there)), own), ((hot, int(here)), theirs)),
    )


def _best_copy(slots_NS: NDArray, load_E: NDArray, copies_E: NDArray, load_N: NDArray) -> _Action:
    """Another copy of an expert of the busiest rank, in an empty slot or in the place of a copy that has sisters."""
    hot = int(load_N.argmax())
    experts = np.unique(slots_NS[hot][slots_NS[hot] != EMPTY])
    best = _Action(0.0, 1, ())
    held_NE = (slots_NS[..., None] == experts).any(1)  # (N, candidates)
    spare = np.where(slots_NS == EMPTY, True, copies_E[slots_NS] > 1)
    freed_NS = slot_load(slots_NS, load_E / copies_E)
    for index, expert in enumerate(experts):
        size = load_E[expert] / (copies_E[expert] + 1)
        relief = load_E[expert] / copies_E[expert] - size
        there = load_N[:, None] + size - freed_NS
        there = np.where(spare & ~held_NE[:, index, None] & (np.arange(len(load_N)) != hot)[:, None], there, np.inf)
        if there.min() == np.inf:
            continue
        rank, slot = np.unravel_index(there.argmin(), there.shape)
        # The sisters of the copy that gives way take over its rows.
        risen = _sisters_load(slots_NS, load_E, copies_E, load_N, int(slots_NS[rank, slot]))
        gain = load_N[hot] - max(load_N[hot] - relief, there[rank, slot], risen)
        if gain > best.gain:
            best = _Action(float(gain), 1, (((int(rank), int(slot)), int(expert)),))
    return best


def _sisters_load(slots_NS: NDArray, load_E: NDArray, copies_E: NDArray, load_N: NDArray, expert: int) -> float:
    """The busiest of the ranks that hold `expert` once one copy of it is gone and they have its rows."""
    if expert == EMPTY:
        return 0.0
    more = load_E[expert] / (copies_E[expert] - 1) - load_E[expert] / copies_E[expert]
    return float(load_N[(slots_NS == expert).any(1)].max() + more)

"""Parts of a layout: one copy of each expert on a rank, and the homes, which have the optimizer state."""

# L MoE layers, N ranks of an expert-parallel group, S slots of a rank, E logical experts

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import EMPTY, ExpertLayout


def one_copy_a_rank(layout: ExpertLayout) -> NDArray[np.int64]:
    """The slots (L, N, S) with every second copy of an expert on one rank left empty: the first computes its rows."""
    slots_LNS = layout.slots_LNS.copy()
    for slot in range(1, slots_LNS.shape[2]):
        again_LN = (slots_LNS[:, :, :slot] == slots_LNS[:, :, slot : slot + 1]).any(2)
        slots_LNS[:, :, slot][again_LN] = EMPTY
    return slots_LNS


def homes_alone(layout: ExpertLayout) -> ExpertLayout:
    """The layout without the copies that are no home."""
    layers, ranks, _ = layout.shape
    slots_LNS = layout.slots_LNS
    home_LNS = layout.home_LE[np.arange(layers)[:, None, None], slots_LNS]  # of empty slots any: it is not used
    at_home = (slots_LNS != EMPTY) & (home_LNS == np.arange(ranks)[:, None])
    return ExpertLayout(np.where(at_home, slots_LNS, EMPTY), layout.num_experts, layout.version)

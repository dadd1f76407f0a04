"""When a run looks for a better layout, and whether the one it found is worth its moves. Numbers in, a verdict out."""

# L MoE layers, E logical experts

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.load import drift
from pipermoe.layout.split import water_filling


@dataclass(frozen=True, slots=True)
class Trigger:
    """Look every `every_steps` steps, and then only where the busiest rank has more than `threshold` times the mean.

    Steps count from 1. `every_steps` = 1 with `threshold` = 1 looks in every step, as SwiftMoE does; Piper and SmartMoE
    look every so many steps, FlexMoE above a threshold.
    """

    every_steps: int = 100
    threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"every_steps = {self.every_steps}: must be at least 1")
        if self.threshold < 1:
            raise ValueError(f"threshold = {self.threshold}: must be at least 1, which is perfect balance")

    def fires(self, step: int, imbalance_L: Sequence[float], *, spilled: bool = False) -> bool:
        """Whether to plan after `step`, in which the busiest rank of each layer had so many times the mean rows, or was
        spared them by copies for one micro-batch (`spilled`).
        """
        return step % self.every_steps == 0 and (spilled or max(imbalance_L, default=1.0) > self.threshold)


def pays(*, gain_seconds_per_step: float, horizon_steps: float, stays: float, move_seconds: float) -> bool:
    """Whether a new layout earns its move back.

    `horizon_steps` is how long the layout will be used, and `stays` the share of the gain that the measured drift of
    the load leaves over that time (1: the load stands still). `move_seconds` is what the step waits for the move.
    """
    return gain_seconds_per_step * horizon_steps * stays > move_seconds


def gain_rows(before: ExpertLayout, after: ExpertLayout, load_LE: NDArray) -> float:
    """Rows that the busiest ranks of all layers are spared under `load_LE`, as water-filling divides them over copies;
    below 0 where `after` is worse.
    """
    return _peak_rows(before, load_LE) - _peak_rows(after, load_LE)


def _peak_rows(layout: ExpertLayout, load_LE: NDArray) -> float:
    """Rows of the busiest rank, summed over layers."""
    each = zip(layout.slots_LNS, np.rint(load_LE).astype(np.int64), strict=True)
    return float(sum(water_filling(slots_NS, load_E).sum(1).max() for slots_NS, load_E in each))


def gain_that_stays(before: ExpertLayout, after: ExpertLayout, windows: Sequence[NDArray]) -> float:
    """Share of the gain, 0 to 1, that is left when the load is as far from the forecast as the loads of the past are.

    `windows` are measured loads (L, E), oldest first; `after` was planned for the last one. Drift looks alike in both
    directions of time: what the layout would have gained on the windows before is what it will gain on those to come.
    """
    gains = [gain_rows(before, after, load_LE) for load_LE in windows]
    if gains[-1] <= 0:
        return 0.0
    return float(np.clip(np.mean(gains) / gains[-1], 0.0, 1.0))


def horizon_steps(
    windows: Sequence[NDArray], steps_between: int, *, tolerance: float = 0.1, most: float = 1e4
) -> float:
    """Steps until the load will have drifted by `tolerance` (total variation, mean of the layers), at most `most`.

    From the drift between consecutive `windows`, `steps_between` steps apart. Loads that walk drift with the square
    root of time; the straight line taken here is on the safe side beyond one window.
    """
    steps = [drift(earlier, later).mean() for earlier, later in itertools.pairwise(windows)]
    per_step = float(np.mean(steps)) / steps_between if steps else 0.0
    return most if per_step * most <= tolerance else tolerance / per_step

"""When a run looks for a better layout, and whether the one it found is worth its moves. Numbers in, a verdict out."""

# L MoE layers, E logical experts

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.load import drift, imbalance, rank_load


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

    def fires(self, step: int, layout: ExpertLayout, load_LE: NDArray) -> bool:
        """Whether to plan after `step`, whose load was `load_LE`: some layer is above the threshold."""
        due = step % self.every_steps == 0
        return due and bool((imbalance(rank_load(layout, load_LE)) > self.threshold).any())


def pays(*, gain_seconds_per_step: float, horizon_steps: float, stays: float, move_seconds: float) -> bool:
    """Whether a new layout earns its move back.

    `horizon_steps` is how long the layout will be used, and `stays` the share of the gain that the measured drift of
    the load leaves over that time (1: the load stands still). `move_seconds` is what the step waits for the move.
    """
    return gain_seconds_per_step * horizon_steps * stays > move_seconds


def gain_rows(before: ExpertLayout, after: ExpertLayout, load_LE: NDArray) -> float:
    """Rows that the busiest ranks of all layers are spared under `load_LE`; below 0 where `after` is worse."""
    old, new = (rank_load(layout, load_LE).max(1).sum() for layout in (before, after))
    return float(old - new)


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

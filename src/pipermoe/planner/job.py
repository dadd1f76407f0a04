"""What a search is about."""

from __future__ import annotations

from dataclasses import dataclass

from pipermoe.specs.legality import Rule
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.runtimes.own import EXECUTABLE
from pipermoe.specs.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a search is about; `imbalance` is the busiest rank's rows over the mean.

    Beside those of legality a strategy obeys all rules of one of `runtimes`; by default of this project's own. What is
    not simulated may be faster than the last of a ranking by the share `tolerance` at most.
    """

    model: ModelSpec
    platform: Platform
    train: TrainConfig
    world_size: int
    memory_budget_bytes: int
    imbalance: float = 1.0
    runtimes: tuple[tuple[Rule, ...], ...] = (EXECUTABLE,)
    tolerance: float = 0.0

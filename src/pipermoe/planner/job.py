"""What a search is about."""

from __future__ import annotations

from dataclasses import dataclass

from pipermoe.specs.legality import EXECUTABLE, Rule
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a search is about; `imbalance` is the busiest rank's rows over the mean.

    `rules` of a runtime limit the space, beside those of legality; by default this project's own. What is not simulated
    may be faster than the last of a ranking by the share `tolerance` at most.
    """

    model: ModelSpec
    platform: Platform
    train: TrainConfig
    world_size: int
    memory_budget_bytes: int
    imbalance: float = 1.0
    rules: tuple[Rule, ...] = EXECUTABLE
    tolerance: float = 0.0

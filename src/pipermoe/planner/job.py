"""What a search is about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.legality import Rule
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.runtimes.own import EXECUTABLE
from pipermoe.specs.train import TrainConfig

# The share of a rank's memory that plans leave free. Peaks are predicted for even routing, within 2 % of the dry run;
# with the uneven routing of real text the worst rank of `pipermoe demo` then held 2 % more.
HEADROOM = 0.05


class Limits(TypedDict, total=False):
    """What plans have to reckon with: the memory of a rank, the share of it that stays free, the busiest rank's rows
    over the mean. Default: the platform's memory, `HEADROOM`, 1.
    """

    memory_budget_bytes: int | None
    headroom: float
    imbalance: float


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a search is about; `imbalance` is the busiest rank's rows over the mean.

    Plans may fill `memory_budget_bytes`, which is a rank's memory less the share `headroom` of it.
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
    headroom: float = 0.0

    @property
    def memory_bytes(self) -> int:
        """A rank's memory, headroom included."""
        return math.ceil(self.memory_budget_bytes / (1 - self.headroom))


def without_headroom(memory_bytes: int, headroom: float) -> int:
    """What plans may fill of a rank's memory. UserError where that is nothing, or more than all."""
    if not 0 <= headroom < 1:
        raise UserError(describe_value("", "headroom", f"{headroom:.0%}", "must be at least 0 and less than 100 %"))
    return int(memory_bytes * (1 - headroom))

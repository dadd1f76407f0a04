"""What a search is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, Unpack

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

    Plans leave the share `headroom` of a rank's `memory_bytes` free.
    Beside those of legality a strategy obeys all rules of one of `runtimes`; by default of this project's own. What is
    not simulated may be faster than the last of a ranking by the share `tolerance` at most.
    """

    model: ModelSpec
    platform: Platform
    train: TrainConfig
    world_size: int
    memory_bytes: int
    imbalance: float = 1.0
    runtimes: tuple[tuple[Rule, ...], ...] = (EXECUTABLE,)
    tolerance: float = 0.0
    headroom: float = 0.0

    @classmethod
    def of(
        cls,
        model: ModelSpec,
        platform: Platform,
        train: TrainConfig,
        world_size: int,
        runtimes: tuple[tuple[Rule, ...], ...] = (EXECUTABLE,),
        tolerance: float = 0.0,
        **limits: Unpack[Limits],
    ) -> Job:
        """The job within these limits. UserError where they leave nothing, or more than there is."""
        memory = limits.get("memory_budget_bytes") or platform.memory_budget_bytes
        headroom, imbalance = limits.get("headroom", HEADROOM), limits.get("imbalance", 1.0)
        if not 0 <= headroom < 1:
            raise UserError(describe_value("", "headroom", f"{headroom:.0%}", "must be at least 0 and less than 100 %"))
        if not 1 <= imbalance <= model.moe.num_experts:
            rule = f"is the busiest rank's rows over the mean: from 1 to num_experts = {model.moe.num_experts}"
            raise UserError(describe_value("", "imbalance", imbalance, rule))
        return cls(model, platform, train, world_size, memory, imbalance, runtimes, tolerance, headroom)

    @property
    def memory_budget_bytes(self) -> int:
        """What plans may fill of a rank's memory."""
        return int(self.memory_bytes * (1 - self.headroom))

"""Many strategies at once: peak memory and a lower bound of the step, for a million rows in a fraction of a second."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.bound import grouped_bound
from pipermoe.resources.groups import Groups
from pipermoe.resources.memory import prices
from pipermoe.resources.peak import grouped_peak_bytes
from pipermoe.resources.unit_seconds import unit_seconds
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Peak bytes of the worst rank and a lower bound of the step's seconds: arrays (rows,)."""

    peak_bytes: NDArray[np.float64]
    bound: NDArray[np.float64]


def evaluate(
    model: ModelSpec, platform: Platform, train: TrainConfig, table: StrategyTable, imbalance: float = 1.0
) -> Evaluation:
    """Memory and time of every row; `imbalance` is the busiest rank's rows over the mean."""
    if not len(table):
        return Evaluation(np.zeros(0), np.zeros(0))
    groups = Groups(model, train, table)
    of_bytes = partial(prices, model, train, imbalance=imbalance)
    of_seconds = partial(unit_seconds, model, platform, train, imbalance=imbalance)
    return Evaluation(
        grouped_peak_bytes(model, train, groups, of_bytes), grouped_bound(model, platform, train, groups, of_seconds)
    )

"""Configuration: what the arguments of another training system say, in this project's terms."""

from __future__ import annotations

from pipermoe.specs.base import Frozen
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig


class Configuration(Frozen):
    """A model, a job and a strategy. `remarks` are lines about what was read but has no counterpart here."""

    model: ModelSpec
    train: TrainConfig
    strategy: Strategy
    remarks: tuple[str, ...] = ()

    @property
    def microbatches(self) -> int:
        """Micro-batches of a data-parallel rank in a step."""
        return self.strategy.microbatches(self.train.global_batch_size)

"""StepReport: what one training step costs. The resource model predicts one, a run measures one.

Because prediction and measurement are the same type, a term that exists on one side only cannot exist.
"""

from __future__ import annotations

from typing import Literal

from pipermoe.specs.base import Frozen

Term = Literal["forward", "backward", "all_to_all", "pipeline_wait", "gradient_sync", "optimizer", "other"]
TERMS: tuple[Term, ...] = (
    "forward",  # computing forward actions
    "backward",  # computing backward actions
    "all_to_all",  # waiting for dispatch and combine, the count exchange included
    "pipeline_wait",  # waiting for another stage: the bubble and exposed point-to-point transfers
    "gradient_sync",  # reducing gradients, norms and flags over ranks; gathering sharded weights
    "optimizer",  # clipping and updating
    "other",  # the rest: loading the batch, Python between actions
)

# Weights, gradients and optimizer state by what they are; every other tensor by where it is born: `communication`
# buffers of collectives, `activations` in forward actions, `temporary` in backward actions, reductions, the optimizer.
MemoryCategory = Literal["weights", "gradients", "optimizer", "activations", "communication", "temporary"]
MEMORY_CATEGORIES: tuple[MemoryCategory, ...] = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "communication",
    "temporary",
)


class Traffic(Frozen):
    """Calls of one collective on one rank in one step and the bytes it hands to the network.

    All-to-all and send: bytes that leave the rank. All-reduce: bytes of the tensor. Reduce-scatter: bytes of the input.
    All-gather: bytes of the output.
    """

    calls: int
    bytes: int


class RankReport(Frozen):
    """One rank in one step. `traffic` is keyed "collective.axis", for example "all_to_all.ep" or "send.pp"."""

    rank: int
    peak_bytes: int
    memory_bytes: dict[MemoryCategory, int]
    flops: int
    traffic: dict[str, Traffic]
    seconds: dict[Term, float]


class StepReport(Frozen):
    """One step of the whole job; `ranks` in rank order. Seconds are per step, `step_seconds` on the wall clock."""

    step_seconds: float
    ranks: tuple[RankReport, ...]

    def mean_seconds(self, term: Term) -> float:
        """The mean of a term over ranks: the terms' means add up to the step time."""
        return sum(rank.seconds.get(term, 0.0) for rank in self.ranks) / len(self.ranks)

"""Precision: in which number formats a job computes, and how many bytes each parameter costs for it. Data, no code."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipermoe.specs.base import Frozen

Precision = Literal["fp32", "bf16", "fp16", "fp8"]


class StateBytes(Frozen):
    """Bytes that one parameter costs between steps, before anything is sharded.

    `weight` is the copy that products read, `gradient` the accumulator of a step, which is also what travels in its
    reduction; `master` the exact copy that the optimizer updates (0: it updates the weight itself), `moments` all
    running means together (AdamW: two).
    """

    weight: float = Field(gt=0)
    gradient: float = Field(gt=0)
    master: float = Field(default=0.0, ge=0)
    moments: float = Field(default=8.0, ge=0)

    @property
    def optimizer(self) -> float:
        return self.master + self.moments

    @property
    def total(self) -> float:
        return self.weight + self.gradient + self.master + self.moments


class Recipe(Frozen):
    """A way to train: the bytes of an activation element (kept, sent and received), and of each parameter's state."""

    activation: int
    state: StateBytes


_MIXED = Recipe(activation=2, state=StateBytes(weight=2, gradient=4, master=4))

# Mixed precision: Micikevicius et al., arXiv 1710.03740 (fp32 masters); gradients are accumulated and reduced in fp32,
# as in Megatron-LM (`accumulate_allreduce_grads_in_fp32`). "fp8" casts the operands of products only (Transformer
# Engine): what is kept stays bf16; `TrainConfig.state_bytes` says so where weights are stored otherwise.
RECIPES: dict[Precision, Recipe] = {
    "fp32": Recipe(activation=4, state=StateBytes(weight=4, gradient=4)),
    "bf16": _MIXED,
    "fp16": _MIXED,
    "fp8": _MIXED,
}

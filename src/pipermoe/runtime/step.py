"""One training step of one rank: what a trainer runs on real tensors and a dry run on fake ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor

from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.runtime.pipeline.engine import Engine

# What a rank does after the pipeline, in this order: `Meter.action` beside the actions of the schedule.
REDUCE, AGREE, UPDATE, GATHER, CLEAR = "reduce_gradients", "agree", "update", "gather_weights", "zero_gradients"
AFTER_PIPELINE = (REDUCE, AGREE, UPDATE, GATHER, CLEAR)


def training_step(
    engine: Engine,
    optimizer: Optimizer,
    batch: Tensor,
    agree: Callable[[Tensor], float | None],
    learning_rate: float,
    move_experts: Callable[[], None] | None = None,
) -> None:
    """Forward and backward of every micro-batch, reduce, agree, update, gather. Collective: every rank calls it.

    `agree` takes sums over all ranks (squared gradient norm, then the fields of `StepResult`; float64) and returns the
    gradient norm to clip by, or None to leave weights and optimizer as they are. It is where a rank reads its tensors;
    what it raises ends the step before the weights change. `move_experts` may then give experts other ranks.
    """
    meter = engine.meter
    result = engine.step(batch)
    with meter.term("gradient_sync"), meter.born("communication"):
        meter.action = REDUCE
        optimizer.reduce_gradients()
        meter.action = AGREE
        shares = [getattr(result, field.name).double() for field in fields(result)]
        totals = torch.stack([optimizer.owned_squared_norm(), *shares])
        dist.all_reduce(totals, group=engine.groups.world)
        norm = agree(totals)
    if norm is not None:
        with meter.term("optimizer"), meter.born("temporary"):
            meter.action = UPDATE
            optimizer.update(norm, learning_rate)
        with meter.term("gradient_sync"):
            meter.action = GATHER
            if move_experts is not None:
                move_experts()
            optimizer.gather_weights()
            engine.move_correction_biases()
    with meter.term("optimizer"):
        meter.action = CLEAR
        optimizer.zero_gradients()

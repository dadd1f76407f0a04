"""Peak memory of a rank at every stage, by category; arrays (rows, stages) in bytes.

The peak is looked for at the instants that can be it, with the most micro-batches in flight: at the end of the last of
their forwards, in the loss, and in the backward of the stage's last layer. `resources.activations` lists the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pipermoe.resources.activations import INDEX_BYTES, Sizes, dense_layer, head_kept, moe_layer
from pipermoe.resources.stages import StageShapes
from pipermoe.resources.states import StateElements, state_bytes
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.report import MemoryCategory
from pipermoe.specs.strategy_table import RECOMPUTE_NAMES, SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig


def microbatches_in_flight(table: StrategyTable, num_stages: int, global_batch_size: int) -> Any:
    """Micro-batches whose activations a stage holds at its peak: `schedule.memory.in_flight` in closed form.

    GPipe holds all M; 1F1B at most the number of stages from this one to the last (Narayanan et al. 2021, section 2.2).
    """
    microbatches = table.microbatches(global_batch_size)[:, None]
    to_the_end = num_stages - np.arange(num_stages)
    return np.where(_is_gpipe(table), microbatches, np.minimum(to_the_end, microbatches))


@dataclass(frozen=True, slots=True)
class Instant:
    """Bytes that are not states, by where they were born, and for which (rows, stages) this instant exists."""

    activations: Any
    communication: Any
    temporary: Any
    exists: Any

    @property
    def total(self) -> Any:
        return np.where(self.exists, self.activations + self.communication + self.temporary, 0)


def stage_memory(
    model: ModelSpec, train: TrainConfig, shapes: StageShapes, table: StrategyTable, states: StateElements
) -> dict[MemoryCategory, Any]:
    """Bytes by category at the peak; their sum is the peak. One pipeline depth and layer split for the whole table."""
    element = train.recipe.activation
    best: Instant | None = None
    for instant in _instants(model, train, shapes, table, element):
        best = instant if best is None else _larger(best, instant)
    assert best is not None
    return {
        **state_bytes(states, train.recipe.state),
        "activations": best.activations,
        "communication": best.communication,
        "temporary": best.temporary,
    }


def _instants(
    model: ModelSpec, train: TrainConfig, shapes: StageShapes, table: StrategyTable, element: int
) -> Iterator[Instant]:
    """Every instant that can be the peak: after the last forward, in the loss, in the last layer's backward."""
    sizes = Sizes(model, (table.micro_batch_size * train.seq_len)[:, None], element)
    hidden, stage = sizes.hidden, np.arange(shapes.num_stages)
    is_first, is_last, full = stage == 0, stage == shapes.num_stages - 1, _is_full(table)
    local_experts = (model.moe.num_experts // table.expert_parallel)[:, None]
    moe = moe_layer(sizes, local_experts=local_experts)
    dense = dense_layer(sizes)
    head = is_last * head_kept(sizes)
    kept = (
        shapes.moe_layers * np.where(full, moe.kept_full, moe.kept)
        + shapes.dense_layers * np.where(full, dense.kept_full, dense.kept)
        + head
        + is_first * sizes.tokens * INDEX_BYTES
    )
    in_flight = microbatches_in_flight(table, shapes.num_stages, train.global_batch_size)
    received = in_flight * hidden * ~is_first  # the first layer's inputs were born in a receive
    held = in_flight * kept - received
    # Gradients on their way to a neighbour that has not been heard of since (runtime/transfers.py).
    steady = table.microbatches(train.global_batch_size)[:, None] > in_flight
    gradients_sent = np.where(is_first | _is_gpipe(table), 0, steady * hidden)
    everywhere = np.ones(held.shape, dtype=bool)
    merged = np.where(shapes.moe_layers > 0, sizes.rows, 0)
    yield Instant(held + merged + in_flight * np.where(is_last, 0, hidden), received, 0 * held, everywhere)
    # The final norm's backward holds four hidden states; the logits' gradient overwrites the logits.
    yield Instant(held, received, 4 * hidden + gradients_sent, everywhere & is_last)
    incoming = np.where(is_last, 0, hidden)  # the gradient of the output: received, or on the last stage computed
    for block, here in ((moe, shapes.moe_layers > 0), (dense, shapes.moe_layers == 0)):
        for moments, now in ((block.moments, ~full & here), (block.moments_full, full & here)):
            for moment in moments:
                yield Instant(
                    held - head - moment.freed,
                    received + moment.communication + incoming,
                    moment.temporary - incoming + gradients_sent,
                    now,
                )


def _larger(one: Instant, other: Instant) -> Instant:
    """Entry by entry the instant with more bytes."""
    wins = other.total > one.total
    return Instant(
        *(np.where(wins, getattr(other, f.name), getattr(one, f.name)) for f in fields(Instant)),
    )


def _is_gpipe(table: StrategyTable) -> Any:
    return (table.schedule == SCHEDULE_NAMES.index("gpipe"))[:, None]


def _is_full(table: StrategyTable) -> Any:
    return (table.recompute == RECOMPUTE_NAMES.index("full"))[:, None]

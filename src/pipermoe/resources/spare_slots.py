"""What a job that balances its experts holds beyond one that does not: spare slots, copies, states spread anew.

As in `runtime/layout`: a rank has its even share of a layer's experts and `spare_slots` more, whatever they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipermoe.resources.parameters import expert_parameters
from pipermoe.resources.sharded_units import RESIDENT
from pipermoe.resources.stages import StageShapes
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.report import MemoryCategory
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig


def balancing_bytes(
    model: ModelSpec, train: TrainConfig, table: StrategyTable, shapes: StageShapes
) -> dict[MemoryCategory, Any]:
    """Bytes more on the ranks of every row and column of `shapes`: (rows, columns); "optimizer" may be less.

    bound: a spare slot has weights, gradients and optimizer state. decoupled: slots have weights and gradients, and a
    rank has its part of every expert of the layer, with all of the optimizer state. sparse: the slots of the layers in
    work, as whole units under ZeRO-3, and one layer's on their way. Copies for one micro-batch: weights and
    gradients, in one layer.
    """
    balance, state = train.balance, train.recipe.state
    one = expert_parameters(model) / table.expert_tensor_parallel[:, None]
    share = model.moe.num_experts / table.expert_parallel[:, None]
    layers = shapes.routed_layers
    slots, spare = (share + balance.spare_slots) * one, balance.spare_slots * one
    zero = 0.0 * one * layers
    extra: dict[MemoryCategory, Any] = {"weights": zero, "gradients": zero, "optimizer": zero, "communication": zero}
    match balance.mechanism if balance.moves else None:
        case "bound":
            extra["weights"] = layers * spare * state.weight
            extra["gradients"] = layers * spare * state.gradient
            extra["optimizer"] = layers * spare * state.optimizer
        case "decoupled":
            part = _part_of_all(model, table)
            shards = np.where(table.zero_expert >= 1, table.expert_data_parallel, 1)[:, None]
            extra["weights"] = layers * (spare + part) * state.weight
            extra["gradients"] = layers * (spare + part) * state.gradient
            extra["optimizer"] = layers * (part - share * one / shards) * state.optimizer
        case "sparse":
            whole_and_coming = (np.minimum(layers, RESIDENT) + (layers > 0)) * slots
            extra["communication"] = whole_and_coming * (state.weight + state.gradient)
    if balance.spill_above is not None:
        guests = balance.spill_copies * one * (layers > 0)
        extra["communication"] = extra["communication"] + guests * (state.weight + state.gradient)
    return extra


def _part_of_all(model: ModelSpec, table: StrategyTable) -> Any:
    """Elements of all experts of a layer that a rank of the stage keeps: of each parameter an even part, rounded up."""
    ranks = (table.expert_parallel * table.expert_data_parallel)[:, None]
    etp = table.expert_tensor_parallel[:, None]
    return model.moe.num_experts * sum(-(-size // (ranks * etp)) for size in _parameter_sizes(model))


def _parameter_sizes(model: ModelSpec) -> Iterator[int]:
    """Elements of every parameter of an expert: into its width (gate and up are one), back, and their biases."""
    moe, into = model.moe, model.moe.expert_matrices - 1
    yield into * model.hidden_size * moe.expert_width
    yield model.hidden_size * moe.expert_width
    if moe.expert_bias:
        yield into * moe.expert_width
        yield model.hidden_size

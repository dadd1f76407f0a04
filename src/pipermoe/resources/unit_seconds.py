"""What one micro-batch takes in one part of a stage: the seconds that whole numbers of layers are multiplied by.

A stage's seconds are sums over its parts (a layer with experts, a dense layer, the embedding, the head), and a path
through a schedule is a sum over stages and messages. So a strategy is a row of prices, a path a row of counts.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.activations.sizes import Recompute, sizes_of
from pipermoe.resources.communication import exchange_seconds, exchanges, message_bytes
from pipermoe.resources.compute import layer_seconds, stage_seconds
from pipermoe.resources.kinds import distinct
from pipermoe.resources.rates import level_send_seconds
from pipermoe.resources.shared_cores import meeting_work
from pipermoe.resources.stages import ONE_OF_EACH
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig


class Work(IntEnum):
    """What a micro-batch does in a part: computing, and the collectives that it has to wait for.

    Collectives that shared cores carry are part of computing: of the forward and of the input gradient.
    """

    FORWARD = 0
    FORWARD_EXCHANGE = 1
    INPUT_GRAD = 2
    BACKWARD_EXCHANGE = 3
    WEIGHT_GRAD = 4


PARTS = ONE_OF_EACH.num_stages
SHAPE = ("micro_batch_size", "context_parallel", "tensor_parallel", "expert_parallel", "expert_tensor_parallel")
AGAIN = ("recompute", "recompute_modules")
COMPUTED = (*SHAPE, *AGAIN)  # what computing reads
EXCHANGED = (*SHAPE, "dispatcher", "ranks_per_copy", "exchange")  # what collectives read


def columns(work: Work) -> slice:
    """Where the prices of `work` are, one for each part of a stage; the seconds of messages come after all of them."""
    return slice(work * PARTS, (work + 1) * PARTS)


SENDS = len(Work) * PARTS  # the first of the columns of messages, one for each level of the platform


def unit_seconds(
    model: ModelSpec, platform: Platform, train: TrainConfig, table: StrategyTable, imbalance: float = 1.0
) -> NDArray[np.float64]:
    """Seconds (rows, SENDS + levels): every kind of work in every part, and a message on every level of the network.

    They depend on the micro-batch, the degrees inside a stage, recomputation and dispatch only.
    """
    sizes = sizes_of(model, train, table, imbalance=imbalance)
    by_work = compute_units(model, platform, train, table, imbalance)
    kinds = distinct([getattr(table, name) for name in EXCHANGED])
    for work, seconds in exchange_units(model, platform, train, table.take(kinds.rows), imbalance).items():
        each = seconds.take(kinds.of, axis=0)
        by_work[work] = by_work[work] + each if work in by_work else each
    arrives = meeting_work(platform, 2)
    levels = range(len(platform.levels))
    sends = [level_send_seconds(platform, level, message_bytes(sizes)) + arrives for level in levels]
    return np.concatenate([*(by_work[work] for work in Work), np.stack(sends, axis=1)], axis=1)


def compute_units(
    model: ModelSpec, platform: Platform, train: TrainConfig, table: StrategyTable, imbalance: float = 1.0
) -> dict[Work, NDArray[np.float64]]:
    """The computing among them: seconds (rows, PARTS), recomputation in the input gradient.

    Shapes, which say how long anything takes, are few, and so is what they compute again: all pairs are worked out.
    """
    shape = distinct([getattr(table, name) for name in SHAPE])
    again = distinct([getattr(table, name) for name in AGAIN])
    sizes = sizes_of(model, train, table.take(shape.rows[:, None]), imbalance=imbalance)
    layers = layer_seconds(platform.device, train.precision, sizes, Recompute.of(table.take(again.rows)))
    compute, pairs = stage_seconds(layers, ONE_OF_EACH), (len(shape.rows), len(again.rows), PARTS)
    each = {Work.FORWARD: compute.forward, Work.INPUT_GRAD: compute.input_grad, Work.WEIGHT_GRAD: compute.weight_grad}
    return {work: np.broadcast_to(seconds, pairs)[shape.of, again.of] for work, seconds in each.items()}


def exchange_units(
    model: ModelSpec, platform: Platform, train: TrainConfig, table: StrategyTable, imbalance: float = 1.0
) -> dict[Work, NDArray[np.float64]]:
    """What collectives have a part in: seconds (rows, PARTS) of either direction, on shared cores of computing, too."""
    sizes = sizes_of(model, train, table, imbalance=imbalance)
    found = exchange_seconds(platform, exchanges(sizes, ONE_OF_EACH), table)
    each = {Work.FORWARD_EXCHANGE: found.forward, Work.BACKWARD_EXCHANGE: found.backward}
    if platform.host.rank_share < 1:
        each |= {Work.FORWARD: found.forward_carried, Work.INPUT_GRAD: found.backward_carried}
    return {work: np.broadcast_to(seconds, (len(table), PARTS)) for work, seconds in each.items()}

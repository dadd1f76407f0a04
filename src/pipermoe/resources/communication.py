"""Which collectives a rank calls in one step, with how many bytes, and how long they take.

Bytes are counted as `specs.report.Traffic` defines them, the keys are its "collective.axis". Every figure is an array
(rows, stages): a row per strategy, a column per pipeline stage; all ranks of a stage are alike under balanced routing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipermoe.exchange.regular import planned_seconds
from pipermoe.resources.rates import collective_seconds, level_send_seconds
from pipermoe.resources.stages import StageShapes
from pipermoe.resources.states import StateElements
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.network import Collective
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy_table import EXCHANGE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

COUNT_BYTES = 8  # routing counts travel as int64
TOTALS_BYTES = 40  # squared gradient norm, three losses and the dropped share, float64, agreed on by all ranks


@dataclass(frozen=True, slots=True)
class Call:
    """Calls of one collective over one axis per rank and step, and the bytes of all of them together."""

    collective: Collective
    axis: str
    calls: Any
    bytes: Any
    counts: bool = False  # the exchange of routing counts, reported apart

    @property
    def key(self) -> str:
        return f"{self.collective}{'_counts' if self.counts else ''}.{self.axis}"


def all_to_all_calls(model: ModelSpec, train: TrainConfig, shapes: StageShapes, table: StrategyTable) -> list[Call]:
    """The exchanges of one micro-batch's forward and, without the counts, equally of its backward.

    Piper, arXiv 2605.05049, section 1.4 of its review: b*s*k/EP tokens to every other rank; dispatch and combine.
    """
    ep = table.expert_parallel[:, None]
    rows = (table.micro_batch_size * train.seq_len * model.moe.top_k)[:, None]
    leaving = rows * (ep - 1) // ep * model.hidden_size * train.recipe.activation
    counts = (ep - 1) * (model.moe.num_experts // ep) * COUNT_BYTES
    layers = shapes.moe_layers * (ep > 1)
    return [
        Call("all_to_all", "ep", 2 * layers, 2 * layers * leaving),
        Call("all_to_all", "ep", layers, layers * counts, counts=True),
    ]


def message_bytes(model: ModelSpec, train: TrainConfig, table: StrategyTable) -> Any:
    """Bytes of one micro-batch's activations, or of their gradient, between two stages: (rows,)."""
    return table.micro_batch_size * train.seq_len * model.hidden_size * train.recipe.activation


def all_to_all_seconds(platform: Platform, calls: list[Call], table: StrategyTable) -> tuple[Any, Any]:
    """Seconds of one micro-batch's exchanges in the forward and in the backward direction, per stage.

    By the library's collective or by the cheapest exchange plan, as the strategy says.
    """
    ranks = table.expert_parallel[:, None]
    span = (table.expert_parallel * table.expert_tensor_parallel)[:, None]
    planned = (table.exchange == EXCHANGE_NAMES.index("planned"))[:, None]

    def seconds(call: Call) -> Any:
        library = collective_seconds(platform, "all_to_all", ranks, span, call.bytes, call.calls)
        return np.where(planned, planned_seconds(platform, ranks, span, call.bytes, call.calls), library)

    exchange, counts = map(seconds, calls)
    return exchange + counts, exchange


def send_seconds(platform: Platform, table: StrategyTable, sent_bytes) -> Any:
    """Seconds of one message from each stage to the next: (rows, stages - 1); one column at least."""
    boundaries = np.arange(max(1, int(table.num_stages[0]) - 1))
    per_stage = table.ranks_per_stage[:, None]
    seconds = np.zeros((len(table), len(boundaries)))
    pending = np.ones(seconds.shape, dtype=bool)
    for index, level in enumerate(platform.levels):
        first, last = boundaries * per_stage, (boundaries + 2) * per_stage - 1
        here = pending & ((first // level.ranks == last // level.ranks) | (level is platform.levels[-1]))
        seconds[here] = (level_send_seconds(platform, index, sent_bytes[:, None]) + 0 * boundaries)[here]
        pending &= ~here
    return seconds


def sync_calls(train: TrainConfig, table: StrategyTable, states: StateElements) -> tuple[list[Call], list[Call]]:
    """Collectives after the pipeline on flat buffers: those that reduce gradients, and those that gather weights.

    ZeRO-0: one all-reduce. ZeRO-1: one reduce-scatter, and one all-gather after the update. Nothing in a group of one.
    """
    state = train.recipe.state
    reducing, gathering = [], []
    for axis, elements, group, zero in (
        ("dp", states.dense, table.data_parallel * table.context_parallel, table.zero_dense),
        ("edp", states.expert, table.expert_data_parallel, table.zero_expert),
    ):
        shared = ((group > 1)[:, None] & (elements > 0)).astype(np.int64)
        sharded, replicated = shared * (zero > 0)[:, None], shared * (zero == 0)[:, None]
        reducing.append(Call("all_reduce", axis, replicated, replicated * elements * state.gradient))
        reducing.append(Call("reduce_scatter", axis, sharded, sharded * elements * state.gradient))
        gathering.append(Call("all_gather", axis, sharded, sharded * elements * state.weight))
    return reducing, gathering


def sync_seconds(
    platform: Platform, train: TrainConfig, table: StrategyTable, states: StateElements
) -> tuple[Any, Any, Any]:
    """Seconds after the pipeline: reducing gradients, agreeing on their norm over the world (rows, 1), gathering."""
    reducing, gathering = sync_calls(train, table, states)
    sizes = {"dp": table.data_parallel[:, None], "edp": table.expert_data_parallel[:, None]}

    def total(calls: list[Call]) -> Any:
        span = table.ranks_per_stage[:, None]
        parts = [collective_seconds(platform, c.collective, sizes[c.axis], span, c.bytes, c.calls) for c in calls]
        return sum(parts)

    world = table.world_size[:, None]
    return total(reducing), collective_seconds(platform, "all_reduce", world, world, TOTALS_BYTES), total(gathering)


def traffic(
    model: ModelSpec, train: TrainConfig, shapes: StageShapes, table: StrategyTable, states: StateElements
) -> dict[str, Call]:
    """All calls of one step on one rank of every stage, those between stages and those after the pipeline."""
    microbatches = table.microbatches(train.global_batch_size)[:, None]
    exchange, counts = all_to_all_calls(model, train, shapes, table)
    stage = np.arange(shapes.num_stages)
    neighbours = (stage > 0).astype(np.int64) + (stage < shapes.num_stages - 1)
    sends = microbatches * neighbours
    reducing, gathering = sync_calls(train, table, states)
    several = np.broadcast_to((table.world_size > 1)[:, None], sends.shape).astype(np.int64)
    calls = [
        *reducing,
        *gathering,
        Call("all_reduce", "world", several, several * TOTALS_BYTES),
        Call("all_to_all", "ep", 2 * microbatches * exchange.calls, 2 * microbatches * exchange.bytes),
        Call("all_to_all", "ep", microbatches * counts.calls, microbatches * counts.bytes, counts=True),
        Call("send", "pp", sends, sends * message_bytes(model, train, table)[:, None]),
    ]
    return {call.key: call for call in calls}

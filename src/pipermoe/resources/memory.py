"""Peak memory of a rank at every stage, by category, with the tensors that the runtime keeps listed one by one.

Activations are what one micro-batch keeps from its forward to its backward, times the micro-batches that the schedule
has in flight; on top come the tensors that live only while one micro-batch is in a block. Array results are
(rows, stages) in bytes.

Symbols: T tokens of a micro-batch, R = T * top_k routed rows, d hidden, q and g query and key/value widths, H and G
their heads, w expert width, V vocabulary, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipermoe.resources.compute import grouped_query
from pipermoe.resources.rates import ELEMENT_BYTES
from pipermoe.resources.stages import StageShapes
from pipermoe.resources.states import MOMENT_BYTES, MOMENTS, StateElements
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.report import MemoryCategory
from pipermoe.specs.strategy_table import RECOMPUTE_NAMES, SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

INDEX_BYTES = 8


def microbatches_in_flight(table: StrategyTable, num_stages: int, global_batch_size: int) -> Any:
    """Micro-batches whose activations a stage holds at its peak: `schedule.memory.in_flight` in closed form.

    GPipe holds all M; 1F1B at most the number of stages from this one to the last (Narayanan et al. 2021, section 2.2).
    """
    microbatches = table.microbatches(global_batch_size)[:, None]
    to_the_end = num_stages - np.arange(num_stages)
    is_gpipe = (table.schedule == SCHEDULE_NAMES.index("gpipe"))[:, None]
    return np.where(is_gpipe, microbatches, np.minimum(to_the_end, microbatches))


def attention_saved_bytes(model: ModelSpec, tokens, element: int) -> Any:
    """One attention block: x and its norm, q and k before and after rotation, v, output, softmax statistics."""
    attention, hidden = grouped_query(model), model.hidden_size
    query, key_value = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    heads = attention.num_heads + attention.num_kv_heads
    normed = {"none": 0, "head": 1, "full": 1, "l2": 1}[attention.qk_norm]
    statistics = 1 + attention.num_heads + {"none": 0, "head": heads, "full": 2, "l2": heads}[attention.qk_norm]
    elements = 2 * hidden + (1 + normed) * (query + key_value) + key_value + query
    return tokens * (elements * element + statistics * 4)


def moe_saved_bytes(model: ModelSpec, tokens, element: int) -> Any:
    """One MoE block: its input and norm, router scores and choices, and the routed rows at each step of the experts."""
    moe, hidden = model.moe, model.hidden_size
    rows = tokens * moe.top_k
    token_bytes = 2 * hidden * element + 4 + 2 * moe.num_experts * 4
    choice_bytes = 2 * INDEX_BYTES + 3 * 4
    row_bytes = (2 * hidden + 4 * moe.expert_width) * element
    shared = tokens * 4 * moe.shared_width * element
    return tokens * token_bytes + rows * (choice_bytes + row_bytes) + shared


def dense_saved_bytes(model: ModelSpec, tokens, element: int) -> Any:
    """One dense feed-forward block: its input and norm, gate, up, silu(gate) and their product."""
    return tokens * ((2 * model.hidden_size + 4 * model.dense_width) * element + 4)


def stage_memory(
    model: ModelSpec, train: TrainConfig, shapes: StageShapes, table: StrategyTable, states: StateElements
) -> dict[MemoryCategory, Any]:
    """Bytes by category at the peak; their sum is the peak. One pipeline depth and layer split for the whole table."""
    element = ELEMENT_BYTES[train.precision]
    tokens = (table.micro_batch_size * train.seq_len)[:, None]
    full = (table.recompute == RECOMPUTE_NAMES.index("full"))[:, None]
    hidden_bytes = tokens * model.hidden_size * element
    attention = attention_saved_bytes(model, tokens, element)
    moe = moe_saved_bytes(model, tokens, element)
    dense = dense_saved_bytes(model, tokens, element)
    layers = shapes.moe_layers + shapes.dense_layers
    kept = layers * attention + shapes.moe_layers * moe + shapes.dense_layers * dense
    kept_full = layers * hidden_bytes + shapes.moe_layers * 3 * model.moe.top_k * hidden_bytes
    head = shapes.has_head * tokens * (model.vocab_size + 2 * model.hidden_size) * element
    in_flight = microbatches_in_flight(table, shapes.num_stages, train.global_batch_size)
    rebuilt = np.where(full, np.maximum(attention, np.maximum(moe, dense)), 0)
    working = (
        np.maximum(
            shapes.has_head * tokens * 2 * model.vocab_size, tokens * model.moe.top_k * 3 * model.moe.expert_width
        )
        * element
    )
    return {
        "weights": states.held * element,
        "gradients": states.held * element,
        "optimizer": states.updated * MOMENTS * MOMENT_BYTES,
        "activations": in_flight * (np.where(full, kept_full, kept) + head),
        "communication": (2 * (shapes.num_stages > 1) * hidden_bytes) + 0 * states.held,
        "temporary": rebuilt + working,
    }

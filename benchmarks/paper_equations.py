#!/usr/bin/env python3
"""The paper's M_1F1B(i) beside this package's model: states and activations of the first and the last stage.

    python -m benchmarks.paper_equations

docs/paper.md explains the differences. The paper's batch b is taken in both readings that its equation allows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipermoe.resources import paper
from pipermoe.resources.memory import rank_memory
from pipermoe.resources.states import state_elements
from pipermoe.resources.step import placement_of
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig
from pipermoe.specs.units import GIB

SEQ_LEN = 4096
JOBS = (("mixtral-8x7b", 4, 8, 64), ("deepseek-v2", 4, 32, 256), ("deepseek-v3", 16, 64, 2048))  # PP, EP, sequences


def paper_shape(model: ModelSpec) -> paper.Shape:
    moe = model.moe
    heads = model.attention.num_heads
    return paper.Shape(model.num_layers, model.hidden_size, heads, moe.num_experts, moe.top_k, moe.expert_width)


def ours(model: ModelSpec, pipeline: int, expert: int, sequences: int) -> dict[str, np.ndarray]:
    """States and activations of every stage: mixed precision, one sequence a micro-batch, 1F1B, nothing recomputed."""
    table = StrategyTable.of([Strategy(pipeline_parallel=pipeline, data_parallel=expert, expert_parallel=expert)])
    train = TrainConfig(seq_len=SEQ_LEN, global_batch_size=sequences, precision="bf16")
    found = rank_memory(model, train, table, state_elements(model, placement_of(model, table).ranks, table))
    states = [rank["weights"] + rank["gradients"] + rank["optimizer"] for rank in found]
    return {"states": np.array(states), "activations": np.array([sum(rank.values()) for rank in found]) - states}


def theirs(model: ModelSpec, pipeline: int, expert: int, sequences: int) -> dict[str, np.ndarray]:
    """The paper's states, and its activations with b of all ranks or of one where attention is concerned."""
    shape, stages, microbatches = paper_shape(model), np.arange(pipeline), sequences // expert
    share = shape.num_layers / pipeline
    states = share * paper.layer_state_bytes(shape, expert) * np.ones(pipeline)
    printed = paper.one_f_one_b_bytes(shape, sequences, SEQ_LEN, expert, pipeline, microbatches, stages) - states
    in_flight, batch = pipeline - stages, sequences / microbatches
    attention = paper.attention_activation_bytes(batch / expert, SEQ_LEN, shape.hidden_size, shape.num_heads)
    experts = paper.expert_activation_bytes(batch / expert, SEQ_LEN, shape.top_k, shape.hidden_size, shape.expert_width)
    fused = paper.attention_activation_bytes(batch / expert, SEQ_LEN, shape.hidden_size, 0)
    return {
        "states": states,
        "printed": printed,
        "per rank": share * in_flight * (attention + experts),
        "per rank, fused": share * in_flight * (fused + experts),
    }


def table() -> Iterator[str]:
    """Markdown, GiB: first stage / last stage."""
    yield "| job | states: paper | here | activations: as printed | b per rank | and no s x s | here |"
    yield "|---|---|---|---|---|---|---|"
    for name, *job in JOBS:
        model = load_model(name)
        one, other = theirs(model, *job), ours(model, *job)
        columns = (one["states"], other["states"], one["printed"], one["per rank"], one["per rank, fused"])
        cells = [f"{column[0] / GIB:.1f} / {column[-1] / GIB:.1f}" for column in (*columns, other["activations"])]
        yield f"| {name} PP{job[0]} EP{job[1]} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(table()))

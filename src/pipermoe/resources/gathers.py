"""How often ZeRO-3 gathers the weights of each unit (embedding, a layer, head) in one step: read off the schedule.

A forward or backward brings its units in turn, and with each the next one. Two units stay, so what is used again at
once (the layers that a forward ends and its backward begins with) is not gathered twice. Weight gradients need none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipermoe.resources.communication import Call
from pipermoe.resources.states import units_of
from pipermoe.resources.turns import Part, parts_of_stages
from pipermoe.resources.whole_units import WholeWeights, steps_of_use, units_of_stages
from pipermoe.schedule.action import Kind, Schedule
from pipermoe.schedule.builders import schedule_of
from pipermoe.schedule.context import Use
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig

USES_WEIGHTS = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD)


def weight_gathers(model: ModelSpec, train: TrainConfig, strategy: Strategy) -> dict[str, Call]:
    """The gathers of dense and of expert weights at ZeRO-3, calls and bytes (1, pipeline ranks) by `Call.key`."""
    table = StrategyTable.of([strategy])
    dense_copies, expert_copies = strategy.dense_replicas, strategy.expert_replicas
    padded = units_of(model, table).padded(dense_copies, expert_copies)
    routed = {f"layers.{layer}": int(padded.experts.item()) for layer in model.routers}
    dense = {f"layers.{layer}": int(padded.dense_layer.item()) for layer in range(model.num_layers)}
    dense |= {f"layers.{layer}": int(padded.moe_layer.item()) for layer in model.moe_layers}
    dense |= {f"layers.{layer}": int(padded.prediction.item()) for layer in model.prediction_layers}
    dense |= {"embedding": int(padded.embedding.item()), "head": int(padded.head.item())}
    sizes = {}
    if strategy.zero_dense == 3 and dense_copies > 1:
        sizes["dp"] = dense
    if strategy.zero_expert == 3 and expert_copies > 1:
        sizes["edp"] = routed
    if not sizes:
        return {}
    schedule = schedule_of(strategy, train.global_batch_size)
    layers = [model.is_moe(layer) for layer in range(model.num_layers)]
    parts = parts_of_stages(layers, strategy.num_stages, strategy.layer_split, model.mtp_layers)
    units, sharded = units_of_stages(parts), {unit for each in sizes.values() for unit in each}
    tied = model.tie_word_embeddings
    counts = [gathered(schedule, rank, parts, units, sharded, tied=tied) for rank in range(schedule.num_ranks)]
    found = [
        Call(
            "all_gather",
            axis,
            np.array([[sum(n for unit, n in count.items() if unit in elements) for count in counts]]),
            np.array([[sum(n * elements.get(unit, 0) for unit, n in count.items()) for count in counts]])
            * train.recipe.state.weight,
        )
        for axis, elements in sizes.items()
    ]
    return {call.key: call for call in found}


def gathered(
    schedule: Schedule,
    rank: int,
    parts_of: Sequence[Sequence[Part]],
    units_of: Sequence[Sequence[str]],
    sharded: set[str],
    *,
    tied: bool = False,
) -> Counter[str]:
    """How often `rank` gathers each `sharded` unit; `parts_of` and `units_of` by stage, in the order of a forward.

    A `tied` head brings the embedding with it.
    """
    here = WholeWeights(sharded, tied=tied)
    count: Counter[str] = Counter()
    for action in schedule.ranks[rank]:
        kind, stage, beside = action.parts[-1].kind, action.parts[-1].stage, action.stage if action.pair else -1
        if kind in USES_WEIGHTS:
            for at, step in steps_of_use(Use(kind, stage, beside), parts_of):
                if step is not None:
                    count.update(here.begin(units_of[at], step))
    return count

"""How often ZeRO-3 gathers the weights of each unit (embedding, a layer, head) in one step: read off the schedule.

A forward or backward brings its units in turn, and with each the next one. Two units stay, so what is used again at
once (the layers that a forward ends and its backward begins with) is not gathered twice. Weight gradients need none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from pipermoe.resources.communication import Call
from pipermoe.resources.states import units_of
from pipermoe.resources.turns import Part, Step, in_turn, parts_of_stages, steps, turns
from pipermoe.schedule.action import Action, Kind, Schedule
from pipermoe.schedule.builders import schedule_of
from pipermoe.specs.mesh import split_layers
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig

RESIDENT = 2  # units whose gathered weights stay
USES_WEIGHTS = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD)


def weight_gathers(model: ModelSpec, train: TrainConfig, strategy: Strategy) -> dict[str, Call]:
    """The gathers of dense and of expert weights at ZeRO-3, calls and bytes (1, pipeline ranks) by `Call.key`."""
    table = StrategyTable.of([strategy])
    dense_copies, expert_copies = strategy.data_parallel * strategy.context_parallel, strategy.expert_data_parallel
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
    units, sharded = units_of_stages(model, strategy), {unit for each in sizes.values() for unit in each}
    counts = [gathered(schedule, rank, parts, units, sharded) for rank in range(schedule.num_ranks)]
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
) -> Counter[str]:
    """How often `rank` gathers each `sharded` unit; `parts_of` and `units_of` by stage, in the order of a forward."""
    here: list[str] = []
    count: Counter[str] = Counter()
    for action in schedule.ranks[rank]:
        for unit, in_use in _wanted(action, parts_of, units_of):
            if unit not in sharded:
                continue
            if unit in here:
                here.remove(unit)
            else:
                count[unit] += 1
                unused = [each for each in here if each not in in_use]
                for each in unused[: len(here) + 1 - RESIDENT]:
                    here.remove(each)
            here.append(unit)
    return count


def _wanted(
    action: Action, parts_of: Sequence[Sequence[Part]], units_of: Sequence[Sequence[str]]
) -> Iterator[tuple[str, set[str]]]:
    """(unit that is gathered, units in use) in the order of an action: each unit as it begins, and the next one."""
    in_use: dict[bool, str] = {}  # by direction: forward or not
    for stage, step in _steps(action, parts_of):
        units, ahead = units_of[stage], step.place + (1 if step.forward else -1)
        if step.first:
            in_use.pop(step.forward, None)
            yield units[step.place], set(in_use.values())
            in_use[step.forward] = units[step.place]
            if 0 <= ahead < len(units):
                yield units[ahead], set(in_use.values())
        if step.last and not 0 <= ahead < len(units):
            del in_use[step.forward]


def _steps(action: Action, parts_of: Sequence[Sequence[Part]]) -> Iterator[tuple[int, Step]]:
    """The steps of an action and their stages; weight gradients need no weights."""
    if action.pair:
        ahead, behind = (part.stage for part in action.pair)
        for step in in_turn(turns(parts_of[ahead], forward=True), turns(parts_of[behind], forward=False)):
            if step is not None:
                yield (ahead if step.forward else behind), step
    elif action.kind in USES_WEIGHTS:
        for step in steps(parts_of[action.stage], forward=action.kind is Kind.FORWARD):
            yield action.stage, step


def units_of_stages(model: ModelSpec, strategy: Strategy) -> list[list[str]]:
    """The units of every stage in the order of a forward: "embedding", "layers.0" and so on, "head".

    Multi-token prediction uses embedding and head again.
    """
    ranges = split_layers(model.num_layers, strategy.num_stages, strategy.layer_split)
    units = [[f"layers.{layer}" for layer in layers] for layers in ranges]
    units[0].insert(0, "embedding")
    units[-1].append("head")
    for layer in model.prediction_layers:
        units[-1] += ["embedding", f"layers.{layer}", "head"]
    return units

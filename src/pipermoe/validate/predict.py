"""The step time of a recipe by the resource model: its costs per stage on the timeline of its schedule."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from pipermoe.resources.step import StepCosts, step_costs
from pipermoe.schedule.builders import build
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.timeline import simulate
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.validate.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of a step, and of what the busiest pipeline rank spends them on."""

    step_seconds: float
    compute: float
    exchange: float
    waiting: float
    sync: float
    optimizer: float


def predict_step(recipe: Recipe) -> Prediction:
    """Costs of every stage, simulated; then gradients are reduced, weights updated and gathered.

    Published stacks reduce gradients beside the last backward and gather weights beside the first forward: what exceeds
    one micro-batch of it is exposed.
    """
    table, strategy = StrategyTable.of([recipe.strategy]), recipe.strategy
    costs = step_costs(recipe.model, recipe.platform, recipe.train, table)
    cost = {field.name: getattr(costs, field.name)[0] for field in fields(StepCosts)}
    microbatches = int(table.microbatches(recipe.train.global_batch_size)[0])
    schedule = build(strategy.schedule, strategy.pipeline_parallel, microbatches, strategy.virtual_stages)
    durations = Durations(
        forward=cost["forward"].tolist(),
        input_grad=cost["input_grad"].tolist(),
        weight_grad=cost["weight_grad"].tolist(),
        forward_exchange=cost["forward_exchange"].tolist(),
        backward_exchange=cost["backward_exchange"].tolist(),
        transfer=float(cost["send"].max()) if strategy.pipeline_parallel > 1 else 0.0,
    )
    timeline = simulate(schedule, durations)
    stages_of = [list(schedule.stages_of(rank)) for rank in range(schedule.num_ranks)]

    def per_rank(*names: str) -> np.ndarray:
        return np.array([sum(cost[name][stages].sum() for name in names) for stages in stages_of])

    forward, backward = per_rank("forward"), per_rank("input_grad", "weight_grad")
    reducing = np.maximum(0.0, cost["reduce"] - backward)
    gathering = np.maximum(0.0, cost["gather"] - forward)
    updating = cost["norm"] + cost["update"]
    ends = np.array([max(ends) for ends in timeline.end])
    sync = float(cost["flags"][0])
    step = float((ends + reducing).max() + sync + (updating + gathering).max())
    busiest = int(np.argmax(forward + backward))
    compute = microbatches * float((forward + backward)[busiest])
    exchange = microbatches * float(per_rank("forward_exchange", "backward_exchange")[busiest])
    sync += float(reducing[busiest] + gathering[busiest])
    optimizer = float(updating[busiest])
    return Prediction(step, compute, exchange, step - compute - exchange - sync - optimizer, sync, optimizer)

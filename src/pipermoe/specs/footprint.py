"""Footprint: what one rank of a training job uses in one step, action by action. What a dry run returns."""

from __future__ import annotations

from pipermoe.specs.base import Frozen
from pipermoe.specs.report import RankReport, Traffic
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig


class ActionFootprint(Frozen):
    """One action of the schedule (`3F0`: forward of micro-batch 0 on stage 3), or a part of the step after them.

    `stage` and `microbatch` are None after the pipeline. `peak_bytes` is the most that is alive while it runs, 0 if it
    creates nothing.
    """

    action: str
    kind: str
    stage: int | None = None
    microbatch: int | None = None
    flops: int
    peak_bytes: int
    traffic: dict[str, Traffic]


class Routing(Frozen):
    """How rows were spread over experts: `rows` reach this rank in one MoE layer and micro-batch, of a `mean_rows`."""

    description: str
    rows: int
    mean_rows: float
    busiest_rank: int  # in the expert-parallel group
    busiest_rows: int


class Footprint(Frozen):
    """One step of one rank. `report` has what a run measures, its seconds empty; `actions` add up to it.

    `flops_by_module` is keyed "attention", "attention_core" (products without weights), "router", "experts", "shared",
    "mlp" and "head".
    """

    model: str
    train: TrainConfig
    strategy: Strategy
    microbatches: int
    stages: tuple[int, ...]
    layers: tuple[int, ...]
    routing: Routing
    report: RankReport
    peak_action: ActionFootprint
    flops_by_module: dict[str, int]
    actions: tuple[ActionFootprint, ...]

"""Where the seconds of a step go: computing by module, and what is exposed of everything else."""

from __future__ import annotations

import numpy as np

from pipermoe.planner.job import Job
from pipermoe.planner.result import Candidate
from pipermoe.resources.activations.sizes import Recompute, sizes_of
from pipermoe.resources.parts import PARTS, Part, part_seconds
from pipermoe.resources.step import placement_of
from pipermoe.specs.report import TERMS
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable

COMPUTING = ("forward", "backward")


def breakdown(job: Job, chosen: Candidate) -> dict[str, float]:
    """Mean seconds of a rank by part of its computing, "imbalance", and by the other terms; they add up to the step.

    Where ranks share cores, all parts of the computing are stretched alike.
    """
    balanced, uneven = (_computing(job, chosen.strategy, imbalance) for imbalance in (1.0, job.imbalance))
    parts: dict[str, float] = {part: balanced[part] for part in PARTS}
    parts["imbalance"] = sum(uneven.values()) - sum(balanced.values())
    stretch = sum(chosen.seconds[term] for term in COMPUTING) / sum(parts.values())
    rest = {term: chosen.seconds[term] for term in TERMS if term not in COMPUTING}
    return {part: stretch * seconds for part, seconds in parts.items()} | rest


def _computing(job: Job, strategy: Strategy, imbalance: float) -> dict[Part, float]:
    """Seconds of one micro-batch on all stages by part."""
    table = StrategyTable.of([strategy])
    sizes = sizes_of(job.model, job.train, table, imbalance=imbalance)
    shapes = placement_of(job.model, table).stages
    parts = part_seconds(job.platform.device, job.train.precision, sizes, Recompute.of(table), shapes)
    return {part: float(np.sum(seconds)) for part, seconds in parts.items()}

"""Plan and Measurement: the files that the commands pass on to each other."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipermoe.specs.base import Frozen
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.report import StepReport
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

RuntimeName = Literal["pipermoe", "megatron", "torchtitan", "deepspeed"]  # specs/runtimes says what each executes


class PlanInput(Frozen):
    """One number that entered the plan and where it came from."""

    value: float | int | str
    source: str


class Plan(Frozen):
    """A strategy for a job on a machine, with its predicted cost, what can execute it, and every input's source."""

    name: str
    platform: str
    memory_budget_bytes: int = Field(gt=0)
    model: ModelSpec
    train: TrainConfig
    strategy: Strategy
    prediction: StepReport
    runs_on: tuple[RuntimeName, ...] = ()
    inputs: dict[str, PlanInput] = {}


class Measurement(Frozen):
    """What a run of a plan measured, in the plan's own terms. A loss is None where it was not finite."""

    plan: str
    strategy: Strategy
    steps: int
    measured_steps: int
    report: StepReport
    step_seconds: tuple[float, ...]
    losses: tuple[float | None, ...]
    validation_loss_before: float
    validation_loss_after: float
    tokens_per_second: float
    model_flops_utilization: float | None = None
    software: dict[str, str] = {}

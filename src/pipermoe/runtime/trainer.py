"""The training loop of one rank: build, validate, step, count one step, checkpoint, validate, report."""

from __future__ import annotations

import math
import platform as host
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

import pipermoe
from pipermoe.resources.flops import model_forward_flops
from pipermoe.runtime.checkpoint import load_checkpoint
from pipermoe.runtime.checkpoint_writer import CheckpointWriter
from pipermoe.runtime.counting import counted
from pipermoe.runtime.data.batches import TextData, micro_batches
from pipermoe.runtime.data.stream import Sequences
from pipermoe.runtime.engine import Engine
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.hf_weights import load_weights, save_weights
from pipermoe.runtime.learning_rate import learning_rate
from pipermoe.runtime.log import CONVENTION, StepLine, StepLog, progress_bar
from pipermoe.runtime.measurement import StepSeconds, counted_step, measured_steps, step_report
from pipermoe.runtime.optimizer import Optimizer
from pipermoe.runtime.step import training_step
from pipermoe.schedule.builders import build
from pipermoe.schedule.communication import with_communication
from pipermoe.specs.documents import save
from pipermoe.specs.errors import UserError
from pipermoe.specs.plan import Measurement, Plan
from pipermoe.specs.report import RankReport
from pipermoe.specs.units import format_bytes, format_seconds

MEASUREMENT_FILE = "measurement.json"
WEIGHTS_FOLDER = "weights"


@dataclass(frozen=True, slots=True)
class Run:
    """How a plan is run, beside what it says. `steps`: where to stop, if not where the plan does.

    `weights`: a folder of published weights to start from; the trained ones are written the same way.
    """

    output: Path
    steps: int | None = None
    resume: Path | None = None
    weights: Path | None = None
    quiet: bool = False
    timeout: timedelta = timedelta(seconds=180)
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class StepResult:
    """Exact values of the whole job, equal on every rank, and this rank's times."""

    loss: float
    auxiliary: float
    grad_norm: float
    rate: float
    timing: StepSeconds


def train(plan: Plan, data: TextData, run: Run) -> Measurement | None:
    """Train this rank's part of `plan` and measure it. Collective: every rank calls it, after init_process_group.

    Writes `steps.jsonl`, checkpoints and `measurement.json` into `run.output`. Returns the measurement on rank 0.
    """
    return Trainer(plan, data, run).train()


class Trainer:
    """One rank of a job and what it trains with."""

    def __init__(self, plan: Plan, data: TextData, run: Run) -> None:
        self.plan, self.data, self.run = plan, data, run
        strategy, job = plan.strategy, plan.train
        self.groups = ProcessGroups.create(strategy, run.timeout)
        microbatches = job.global_batch_size // (strategy.data_parallel * strategy.micro_batch_size)
        schedule = build(strategy.schedule, strategy.pipeline_parallel, microbatches, strategy.virtual_stages)
        self.engine = Engine(plan.model, job, strategy, with_communication(schedule), self.groups, device=run.device)
        self.meter = self.engine.meter
        if run.weights is not None and run.resume is None:
            first_expert = self.groups.coordinates.ep * self.engine.local_experts
            load_weights(run.weights, plan.model, self.engine.named_state(), first_expert)
        self.optimizer = Optimizer(self.engine.flats, job.optimizer)  # copies the weights if they are not fp32
        self.checkpoints = CheckpointWriter(run.output, plan, self.groups)
        self.steps = run.steps or job.steps
        self.first = self._resume()
        self.reports: list[RankReport] = []
        self.log: StepLog | None = None

    def _resume(self) -> int:
        if self.run.resume is None:
            return 0
        biases = self.engine.correction_biases()
        first = load_checkpoint(self.run.resume, self.plan, self.optimizer, biases, self.groups)
        if first >= self.steps:
            raise UserError(f"{self.run.resume}: has trained {first} of {self.steps} steps already; use --steps")
        return first

    def train(self) -> Measurement | None:
        if self.groups.rank == 0:
            budget = self.plan.memory_budget_bytes
            self.log = StepLog(self.run.output, budget, self.first, quiet=self.run.quiet)
        self._say(self._introduction())
        before = self.validation_loss()
        self._say(f"validation loss before: {before:.5f}")
        results = self._all_steps()
        after = self.validation_loss()
        self._say(f"validation loss after: {after:.5f}")
        if self.run.weights is not None:
            written = self.run.output / WEIGHTS_FOLDER
            save_weights(written, self.plan.model, self.run.weights, self.engine.named_state(), self.groups)
            self._say(f"weights: {written}")
        measurement = self._measurement(results, before, after)
        if measurement is not None and self.log is not None:
            save(self.run.output / MEASUREMENT_FILE, measurement)
            self.log.close()
        return measurement

    def _all_steps(self) -> list[StepResult]:
        results = []
        under_counters, every = counted_step(self.first, self.steps), self.plan.train.checkpoint_every
        with progress_bar("training", self.steps - self.first, shown=self.groups.rank == 0) as bar:
            for step in range(self.first, self.steps):
                result = self._counted_step(step) if step == under_counters else self.step(step)
                results.append(result)
                self._log_step(step, result)
                if bar is not None:
                    bar.advance(bar.task_ids[0])
                done = step + 1
                if every and (done % every == 0 or done == self.steps):
                    self.checkpoints.save(done, self.optimizer, self.engine.correction_biases())
        self.checkpoints.finish()
        return results

    def step(self, step: int) -> StepResult:
        """One training step: forward and backward, reduce, update. Raises `UserError` where the loss is not finite."""
        start = time.perf_counter()
        self.meter.reset()
        agreed: list[float] = []

        def agree(totals: Tensor) -> float:
            squared_norm, loss, auxiliary = totals.tolist()
            norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
            self._check_finite(step, loss, norm)
            agreed[:] = loss, auxiliary, norm
            return norm

        rate = learning_rate(step, self.plan.train.optimizer, self.plan.train.steps)
        batch = self._share(self.data.train, self.data.training_numbers(step))
        training_step(self.engine, self.optimizer, batch, agree, rate)
        loss, auxiliary, norm = agreed
        seconds = time.perf_counter() - start
        return StepResult(loss, auxiliary, norm, rate, StepSeconds(step, seconds, dict(self.meter.seconds)))

    def _counted_step(self, step: int) -> StepResult:
        """The step that runs under the counters: everything of it is counted, its time is not."""
        result, own = counted(self.groups.rank, self.meter, self.optimizer, lambda: self.step(step))
        gathered: list[Any] = [None] * self.plan.strategy.world_size
        dist.all_gather_object(gathered, own, group=self.groups.world)
        self.reports = gathered
        worst = max(self.reports, key=lambda report: report.peak_bytes)
        budget = self.plan.memory_budget_bytes
        if worst.peak_bytes > budget:
            peak = format_bytes(worst.peak_bytes)
            self._say(f"warning: rank {worst.rank} holds {peak} at its peak; the budget is {format_bytes(budget)}")
        return result

    def validation_loss(self) -> float:
        """Mean cross-entropy over the held-back batches, nats per token; the same on every rank and arrangement."""
        total = torch.zeros((), dtype=torch.float64, device=self.run.device)
        for index in range(self.data.validation_batches):
            batch = self._share(self.data.validation, self.data.validation_numbers(index))
            total += self.engine.evaluate(batch).loss.double()
        dist.all_reduce(total, group=self.groups.world)
        return total.item() / self.data.validation_batches

    def _share(self, sequences: Sequences, numbers_B: NDArray[np.integer]) -> Tensor:
        """This data-parallel rank's micro-batches of a global batch: (microbatches, micro_batch_size, seq_len + 1)."""
        strategy, dp = self.plan.strategy, self.groups.coordinates.dp
        own = micro_batches(numbers_B, strategy.data_parallel, dp, strategy.micro_batch_size)
        return torch.from_numpy(sequences[own]).to(self.run.device)

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        for name, value in (("loss", loss), ("grad_norm", norm)):
            if not math.isfinite(value):
                rate = self.plan.train.optimizer.learning_rate
                raise UserError(
                    f"step {step + 1}: {name} = {value}: training diverged; lower optimizer.learning_rate = {rate:g} "
                    f"or raise optimizer.warmup_steps = {self.plan.train.optimizer.warmup_steps}"
                )

    def _flops_per_second(self, seconds: float) -> float:
        """Model FLOP/s per rank: causal attention, forward and twice that backward, no recompute."""
        job = self.plan.train
        forward = model_forward_flops(self.plan.model, tokens=job.tokens_per_step, seq_len=job.seq_len, causal=True)
        return 3 * float(forward) / seconds / self.plan.strategy.world_size

    def _utilization(self, seconds: float) -> float | None:
        """MFU, if the plan says what a rank's peak is."""
        peak = self.plan.inputs.get("peak_flops_per_s")
        return self._flops_per_second(seconds) / float(peak.value) if peak is not None else None

    def _log_step(self, step: int, result: StepResult) -> None:
        if self.log is None:
            return
        seconds = result.timing.seconds
        self.log.step(
            StepLine(
                step=step + 1,
                loss=result.loss,
                auxiliary_loss=result.auxiliary,
                grad_norm=result.grad_norm,
                learning_rate=result.rate,
                seconds=seconds,
                tokens_per_second=self.plan.train.tokens_per_step / seconds,
                flops_per_second=self._flops_per_second(seconds),
                mfu=self._utilization(seconds),
                peak_bytes=max((report.peak_bytes for report in self.reports), default=None),
                seconds_by_term=result.timing.terms,
            )
        )

    def _measurement(self, results: list[StepResult], before: float, after: float) -> Measurement | None:
        """The measurement, put together on rank 0 from what every rank timed and counted."""
        measured = measured_steps(self.first, self.steps)
        own = [result.timing for result in results if result.timing.step in measured]
        timings: list[list[StepSeconds]] = [own] * self.plan.strategy.world_size
        dist.gather_object(own, timings if self.groups.rank == 0 else None, dst=0, group=self.groups.world)
        if self.groups.rank != 0:
            return None
        report = step_report(self.reports, timings)
        walls = tuple(max(rank.seconds for rank in step) for step in zip(*timings, strict=True))
        self._say(_summary(report.step_seconds, self.plan.prediction.step_seconds, len(measured), self.reports))
        return Measurement(
            plan=self.plan.name,
            strategy=self.plan.strategy,
            steps=len(results),
            measured_steps=len(measured),
            report=report,
            step_seconds=walls,
            losses=tuple(result.loss for result in results),
            validation_loss_before=before,
            validation_loss_after=after,
            tokens_per_second=self.plan.train.tokens_per_step / report.step_seconds,
            model_flops_utilization=self._utilization(report.step_seconds),
            software={
                "pipermoe": pipermoe.__version__,
                "torch": torch.__version__,
                "python": host.python_version(),
            },
        )

    def _introduction(self) -> str:
        strategy, job = self.plan.strategy, self.plan.train
        resumed = f", resumed after step {self.first}" if self.first else ""
        return (
            f"{self.plan.model.name}: {strategy.world_size} ranks, {strategy.compact()}, {strategy.schedule}; "
            f"{job.global_batch_size} sequences of {job.seq_len} tokens a step{resumed}; text: {self.data.source}\n"
            f"{CONVENTION}"
        )

    def _say(self, text: str) -> None:
        if self.log is not None:
            self.log.say(text)


def _summary(seconds: float, predicted: float, steps: int, reports: list[RankReport]) -> str:
    peak = max(report.peak_bytes for report in reports)
    return (
        f"step time {format_seconds(seconds)} over {steps} steps (predicted {format_seconds(predicted)}), "
        f"peak memory {format_bytes(peak)}"
    )

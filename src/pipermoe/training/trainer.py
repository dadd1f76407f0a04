"""The training loop of one rank: build, validate, step, count one step, checkpoint, validate, report."""

from __future__ import annotations

import math
import platform as host
import time

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

import pipermoe
from pipermoe.data.batches import TextData, micro_batches
from pipermoe.data.stream import Sequences
from pipermoe.exchange.executor.gather_json import all_gather_json
from pipermoe.modules.hf.weights import load_weights
from pipermoe.processes.blame import WAITING
from pipermoe.processes.progress import Display
from pipermoe.resources.flops import training_forward_flops
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.layout.lay_out import first_layout
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.runtime.step import training_step
from pipermoe.runtime.trace import Trace, spans_of
from pipermoe.schedule.action import Action
from pipermoe.schedule.builders import schedule_of
from pipermoe.schedule.communication import with_communication
from pipermoe.specs.chrome_trace import write_chrome_trace
from pipermoe.specs.documents import save
from pipermoe.specs.errors import MachineError, UserError
from pipermoe.specs.plan import Measurement, Plan
from pipermoe.specs.report import RankReport
from pipermoe.specs.units import format_bytes, format_number, format_seconds
from pipermoe.training.agreement import check_same_job
from pipermoe.training.balancing.balance_line import BalanceLine
from pipermoe.training.balancing.balancer import Balancer
from pipermoe.training.checkpoint.hf_weights import save_weights
from pipermoe.training.checkpoint.store import load_checkpoint, saved_layout
from pipermoe.training.checkpoint.writer import CheckpointWriter
from pipermoe.training.counting import counted
from pipermoe.training.learning_rate import learning_rate
from pipermoe.training.log import CONVENTION, StepLine, StepLog
from pipermoe.training.measurement import StepSeconds, counted_step, measured_steps, step_report
from pipermoe.training.metrics import StepOutcome, take_census
from pipermoe.training.run import Run

MEASUREMENT_FILE = "measurement.json"
TRACE_FILE = "trace.json"
WEIGHTS_FOLDER = "weights"
MOST_SKIPPED = 10  # steps in a row; a run that skips more does not recover


def train(plan: Plan, data: TextData, run: Run) -> Measurement | None:
    """Train this rank's part of `plan` and measure it. Collective: every rank calls it, after init_process_group.

    Writes `steps.jsonl`, `loads.jsonl`, checkpoints and `measurement.json` into `run.output`. Returns the measurement
    on rank 0.
    """
    return Trainer(plan, data, run).train()


class Trainer:
    """One rank of a job and what it trains with."""

    def __init__(self, plan: Plan, data: TextData, run: Run) -> None:
        self.plan, self.data, self.run = plan, data, run
        strategy, job = plan.strategy, plan.train
        self.display = Display(shown=dist.get_rank() == 0)
        with self._phase("building the model"):
            schedule = schedule_of(strategy, job.global_batch_size)
            check_same_job(plan.model, job, strategy, schedule, data.fingerprint, run.device)
            self.groups = ProcessGroups.create(strategy, run.timeout)
            self.engine = Engine(
                plan.model,
                job,
                strategy,
                with_communication(schedule),
                self.groups,
                device=run.device,
                laid_out=first_layout(plan, self.groups),
            )
        self.meter = self.engine.meter
        if run.weights is not None and run.resume is None:
            with self._phase(f"loading {run.weights}"):
                first_expert = self.groups.coordinates.ep * self.engine.local_experts
                load_weights(run.weights, plan.model, self.engine.named_state(), first_expert)
        self.optimizer = Optimizer(self.engine.flats, job.optimizer)  # copies the weights if they are not fp32
        self.checkpoints = CheckpointWriter(run.output, plan, data.fingerprint, self.groups)
        self.balancer = Balancer(job.balance, self.engine, self.optimizer) if job.balance.moves else None
        self.steps = run.steps or job.steps
        self.first = self._resume()
        self.skipped = 0  # steps in a row
        self.reports: list[RankReport] = []
        self.trace = Trace(self.groups.rank)
        self.log: StepLog | None = None

    def _phase(self, title: str, total: int | None = None):
        """What this rank is doing outside of steps: shown on a terminal, and told to whoever watches over it."""
        self.run.tell(title)
        return self.display.activity(title, total)

    def _resume(self) -> int:
        if self.run.resume is None:
            return 0
        with self._phase(f"loading {self.run.resume}"):
            if self.balancer is not None:
                self.balancer.resume(saved_layout(self.run.resume))
            biases = self.engine.correction_biases()
            first = load_checkpoint(self.run.resume, self.plan, self.optimizer, biases)
        if first >= self.steps:
            raise UserError(f"{self.run.resume}: has trained {first} of {self.steps} steps already; use --steps")
        return first

    def train(self) -> Measurement | None:
        if self.groups.rank == 0:
            budget, run = self.plan.memory_budget_bytes, self.run
            self.log = StepLog(run.output, budget, self.first, quiet=run.quiet, tensorboard=run.tensorboard)
        self._say(self._introduction())
        before = self.validation_loss()
        self._say(f"validation loss before: {before:.5f}")
        results, after = self._all_steps()
        self._say(f"validation loss after: {after:.5f}")
        if self.run.weights is not None:
            written = self.run.output / WEIGHTS_FOLDER
            with self._phase(f"writing {written}"):
                save_weights(written, self.plan.model, self.run.weights, self.engine.named_state(), self.groups)
            self._say(f"weights: {written}")
        measurement = self._measurement(results, before, after)
        if measurement is not None and self.log is not None:
            save(self.run.output / MEASUREMENT_FILE, measurement)
            self.log.close()
        return measurement

    def _all_steps(self) -> tuple[list[StepOutcome], float]:
        """Every step's result, and the validation loss after the last."""
        results, validation = [], math.nan
        under_counters, job = counted_step(self.first, self.steps), self.plan.train
        with self._phase("training", self.steps - self.first) as show:
            for step in range(self.first, self.steps):
                done = step + 1
                self.meter.trace = self.trace if done in self.run.trace_steps else None
                result = self._counted_step(step) if step == under_counters else self.step(step)
                self.meter.trace = None
                results.append(result)
                validated = _due(done, job.validate_every) or done == self.steps
                validation = self.validation_loss() if validated else math.nan
                self._log_step(step, result, validation if validated else None)
                show(done - self.first)
                if done == max(self.run.trace_steps, default=0):
                    self._write_trace()
                if job.checkpoint_every and (_due(done, job.checkpoint_every) or done == self.steps):
                    with self._phase(f"saving the checkpoint of step {done}"):
                        placement = self.engine.placement
                        layout = placement.layout if placement else None
                        self.checkpoints.save(done, self.optimizer, self.engine.correction_biases(), layout)
            with self._phase("finishing the last checkpoint"):
                self.checkpoints.finish()
        return results, validation

    def step(self, step: int) -> StepOutcome:
        """One training step: forward and backward, reduce, update. Errors name the step."""
        start = time.perf_counter()
        self.meter.reset()
        self.meter.on_change = lambda action, waits: self.run.tell(
            f"step {step + 1}, {_describe(action)}{WAITING if waits else ''}"
        )
        agreed: list[float] = []

        def agree(totals: Tensor) -> float | None:
            squared_norm, *losses = totals.tolist()
            norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
            agreed[:] = norm, *losses
            return norm if self._is_finite(step, losses[0], norm) else None

        rate = learning_rate(step, self.plan.train.optimizer, self.plan.train.steps)
        batch = self._share(self.data.train, self.data.training_numbers(step))
        try:
            move = self.balancer.move if self.balancer else None
            training_step(self.engine, self.optimizer, batch, agree, rate, move)
        except MachineError as error:
            raise MachineError(f"step {step + 1}: {error}") from error
        except UserError:
            raise
        except Exception as error:
            where = f"step {step + 1}: rank {self.groups.rank}: {_describe(self.meter.action)}"
            raise MachineError(f"{where} failed: {type(error).__name__}: {error}") from error
        norm, loss, mtp_loss, auxiliary, z_loss, dropped = agreed
        timing = StepSeconds(step, time.perf_counter() - start, dict(self.meter.seconds))
        return StepOutcome(loss, mtp_loss, auxiliary, z_loss, dropped, norm, rate, timing, skipped=self.skipped > 0)

    def _is_finite(self, step: int, loss: float, norm: float) -> bool:
        """Whether the step may change the weights; every rank sees the same numbers. Raises `UserError` to stop."""
        name, value = ("grad_norm", norm) if math.isfinite(loss) else ("loss", loss)
        if math.isfinite(value):
            self.skipped = 0
            return True
        self.skipped += 1
        config = self.plan.train.optimizer
        advice = (
            f"training diverged; lower optimizer.learning_rate = {config.learning_rate:g} or raise "
            f"optimizer.warmup_steps = {config.warmup_steps}"
        )
        if self.plan.train.on_nonfinite == "stop":
            raise UserError(f'step {step + 1}: {name} = {value}: {advice}, or set on_nonfinite = "skip"')
        if self.skipped > MOST_SKIPPED:
            raise UserError(f"step {step + 1}: {name} = {value}, like in the {MOST_SKIPPED} steps before: {advice}")
        self._say(f"warning: step {step + 1}: {name} = {value}: skipped, the weights stay as they were")
        return False

    def _counted_step(self, step: int) -> StepOutcome:
        """The step that runs under the counters: everything of it is counted, its time is not."""
        result, own = counted(self.groups.rank, self.meter, self.optimizer, lambda: self.step(step))
        gathered = all_gather_json(own.model_dump(mode="json"), self.groups.world)
        self.reports = [RankReport.model_validate(report) for report in gathered]
        worst = max(self.reports, key=lambda report: report.peak_bytes)
        budget = self.plan.memory_budget_bytes
        if worst.peak_bytes > budget:
            peak = format_bytes(worst.peak_bytes)
            self._say(f"warning: rank {worst.rank} holds {peak} at its peak; the budget is {format_bytes(budget)}")
        return result

    def validation_loss(self) -> float:
        """Mean cross-entropy over the held-back batches, nats per token; the same on every rank and arrangement."""
        self.meter.on_change = None
        total = torch.zeros((), dtype=torch.float64, device=self.run.device)
        with self._phase("validating", self.data.validation_batches) as show:
            for index in range(self.data.validation_batches):
                batch = self._share(self.data.validation, self.data.validation_numbers(index))
                total += self.engine.evaluate(batch).loss.double()
                show(index + 1)
        dist.all_reduce(total, group=self.groups.world)
        return total.item() / self.data.validation_batches

    def _share(self, sequences: Sequences, numbers_B: NDArray[np.integer]) -> Tensor:
        """This data-parallel rank's micro-batches of a global batch: (microbatches, micro_batch_size, seq_len + 1)."""
        strategy, dp = self.plan.strategy, self.groups.coordinates.dp
        own = micro_batches(numbers_B, strategy.data_parallel, dp, strategy.micro_batch_size)
        return torch.from_numpy(sequences[own]).to(self.run.device)

    def _write_trace(self) -> None:
        """The chosen steps of all ranks in one file. Collective."""
        gathered = all_gather_json(self.trace.to_json(), self.groups.world)
        if self.groups.rank == 0:
            path = self.run.output / TRACE_FILE
            write_chrome_trace(path, [span for rank, rows in enumerate(gathered) for span in spans_of(rank, rows)])
            self._say(f"trace: {path} (open in ui.perfetto.dev)")

    def _flops_per_second(self, seconds: float) -> float:
        """Model FLOP/s per rank: causal attention, forward and twice that backward, no recompute."""
        job = self.plan.train
        forward = training_forward_flops(self.plan.model, tokens=job.tokens_per_step, seq_len=job.seq_len, causal=True)
        return 3 * float(forward) / seconds / self.plan.strategy.world_size

    def _utilization(self, seconds: float) -> float | None:
        """MFU, if the plan says what a rank's peak is."""
        peak = self.plan.inputs.get("peak_flops_per_s")
        return self._flops_per_second(seconds) / float(peak.value) if peak is not None else None

    def _log_step(self, step: int, result: StepOutcome, validation: float | None) -> None:
        census = take_census(self.engine, self.groups)
        terms = result.timing.terms
        computing = terms["forward"] + terms["backward"]
        layout = None if census.rank_load is None else BalanceLine(census.rank_load, census.spilled)
        if layout is not None and self.balancer is not None:
            layout = self.balancer.observe(step + 1, census.load_LE, computing, layout)
        if self.log is None:
            return
        seconds = result.timing.seconds
        worst = max(self.reports, key=lambda report: report.peak_bytes, default=None)
        self.log.step(
            StepLine(
                step=step + 1,
                loss=result.loss,
                validation_loss=validation,
                mtp_loss=result.mtp_loss if self.plan.model.mtp_layers else None,
                auxiliary_loss=result.auxiliary,
                z_loss=result.z_loss,
                dropped_share=result.dropped if self.plan.train.capacity_factor else None,
                grad_norm=result.grad_norm,
                learning_rate=result.rate,
                skipped=result.skipped,
                seconds=seconds,
                tokens_per_second=self.plan.train.tokens_per_step / seconds,
                flops_per_second=self._flops_per_second(seconds),
                mfu=self._utilization(seconds),
                peak_bytes=worst.peak_bytes if worst else None,
                memory_bytes=worst.memory_bytes if worst else None,
                resident_bytes=census.resident_bytes,
                expert_load=census.expert_load,
                dead_experts=census.dead_experts,
                seconds_by_term=terms,
                expert_layout=layout,
            ),
            census.load_LE,
        )

    def _measurement(self, results: list[StepOutcome], before: float, after: float) -> Measurement | None:
        """The measurement, put together on rank 0 from what every rank timed and counted."""
        measured = measured_steps(self.first, self.steps)
        own = [result.timing for result in results if result.timing.step in measured]
        rows = [(timing.step, timing.seconds, timing.terms) for timing in own]
        gathered = all_gather_json(rows, self.groups.world)
        if self.groups.rank != 0:
            return None
        timings = [[StepSeconds(*row) for row in rank] for rank in gathered]
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
            losses=tuple(result.loss if math.isfinite(result.loss) else None for result in results),
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
        ranks = format_number(strategy.world_size, "rank")
        resumed = f", resumed after step {self.first}" if self.first else ""
        return (
            f"{self.plan.model.name}: {ranks}, {strategy.compact()}, {strategy.schedule}; "
            f"{job.global_batch_size} sequences of {job.seq_len} tokens a step{resumed}; text: {self.data.source}\n"
            f"{CONVENTION}"
        )

    def _say(self, text: str) -> None:
        if self.log is not None:
            self.log.say(text)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _describe(action: Action | str) -> str:
    if isinstance(action, str):
        return action
    return f"action {action} (stage {action.stage}, micro-batch {action.microbatch})"


def _summary(seconds: float, predicted: float, steps: int, reports: list[RankReport]) -> str:
    peak = max(report.peak_bytes for report in reports)
    took = f"{format_seconds(seconds)} over {format_number(steps, 'step')}"
    return f"step time {took} (predicted {format_seconds(predicted)}), peak memory {format_bytes(peak)}"

"""One pass over a rank's actions: a step's forwards and backwards, or the forwards of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipermoe.modules.weight_gradients import Accumulate
from pipermoe.runtime.pipeline.backlog import Backlog
from pipermoe.runtime.pipeline.interleave import Running, alone, beside
from pipermoe.runtime.pipeline.stage import Tape
from pipermoe.runtime.pipeline.transfers import Transfers
from pipermoe.schedule.action import COMPUTE, RECEIVES, SHARDING, Action, Kind, Schedule
from pipermoe.schedule.arrivals import acknowledgements
from pipermoe.specs.errors import MachineError, UserError

if TYPE_CHECKING:
    from pipermoe.runtime.pipeline.engine import Engine


TOTALS = ("loss", "mtp_loss", "auxiliary", "z_loss", "dropped")  # of a Tape, summed over micro-batches


@dataclass(frozen=True, slots=True)
class StepResult:
    """This rank's share of the global means; the sum over all ranks is the loss of the whole batch.

    `loss` is cross-entropy (zero but on the last stage), `mtp_loss` that of multi-token prediction, `auxiliary` the
    load-balancing loss and `z_loss` the router z-loss before their weights (each stage's share of the means over
    micro-batches and MoE layers; the z-loss is 0 when it has no weight). `dropped` is the share of choices beyond their
    experts' capacity. Scalars on the engine's device.
    """

    loss: Tensor
    mtp_loss: Tensor
    auxiliary: Tensor
    z_loss: Tensor
    dropped: Tensor


@dataclass(frozen=True, slots=True)
class Program:
    """One rank's actions in order, and around which of them messages are posted and known to have arrived.

    `receives_ahead[i]` are the receives between compute action i and the next: they are posted before action i, so that
    they travel while it computes. `arrived[action]` are the sends that a receive proves to have arrived.
    """

    schedule: Schedule
    actions: tuple[Action, ...]
    receives_ahead: dict[int, tuple[Action, ...]]
    arrived: dict[Action, tuple[Action, ...]]

    @classmethod
    def of(cls, schedule: Schedule, rank: int) -> Program:
        """Without sharding actions: weights are gathered and gradients reduced by layer, not by stage (ZeRO)."""
        actions = tuple(action for action in schedule.ranks[rank] if action.kind not in SHARDING)
        ahead: dict[int, list[Action]] = {}
        latest: list[Action] = []
        for i, action in enumerate(actions):
            if action.kind in COMPUTE:
                latest = ahead[i] = []
            elif action.kind in RECEIVES:
                latest.append(action)
        posted = {i: tuple(receives) for i, receives in ahead.items() if receives}
        return cls(schedule, actions, posted, acknowledgements(schedule, rank))

    @property
    def parts(self) -> tuple[Action, ...]:
        """The elementary actions, pairs taken apart."""
        return tuple(part for action in self.actions for part in action.parts)


class Execution:
    """What is between the actions of a step and gone after it."""

    def __init__(self, engine: Engine, program: Program, batch: Tensor):
        expected = (engine.microbatches, engine.strategy.micro_batch_size, engine.train.seq_len + 1)
        if tuple(batch.shape) != expected:
            raise ValueError(f"batch has shape {tuple(batch.shape)}; the engine was built for {expected}")
        self.engine, self.program, self.batch = engine, program, batch
        self.schedule, self.meter = program.schedule, engine.meter
        self.rank, self.last = engine.groups.coordinates.pp, program.schedule.num_stages - 1
        self.keeps = program is engine.training
        shape = torch.Size((expected[1] * engine.train.seq_len, engine.model.hidden_size))
        message = partial(torch.empty, shape, dtype=engine.dtype, device=engine.device)
        self.transfers = Transfers(program.schedule, engine.groups, engine.meter, message)
        self.backlog = Backlog(program.parts)
        # Keyed by (stage, microbatch): what a forward or backward action needs, and what a send carries away.
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.gradients: dict[tuple[int, int], Tensor] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.input_gradients: dict[tuple[int, int], Tensor] = {}
        self.tapes: dict[tuple[int, int], Tape] = {}
        self.totals = {name: torch.zeros((), device=engine.device) for name in TOTALS}

    def run(self) -> StepResult:
        for i, action in enumerate(self.program.actions):
            try:
                for receive in self.program.receives_ahead.get(i, ()):
                    self.meter.action = receive
                    self.transfers.post(receive)
                self._execute(action)
                self.transfers.settle(self.program.arrived.get(action, ()))
            except UserError:
                raise
            except Exception as error:
                raise MachineError(self._describe(error)) from error
        self.transfers.settle_all()
        engine = self.engine
        engine.sharding.settle()
        routers, routed = len(engine.model.routers), self.batch[0, :, 1:].numel() * engine.model.moe.top_k
        scale = engine.scale
        return StepResult(
            self.totals["loss"] * scale,
            self.totals["mtp_loss"] * scale,
            self.totals["auxiliary"] * (scale / routers),
            self.totals["z_loss"] * (scale / routers),
            self.totals["dropped"] * (scale / routers / routed),
        )

    def _execute(self, action: Action) -> None:
        key = (action.stage, action.microbatch)
        self.meter.action = action
        match action.kind:
            case Kind.OVERLAP:
                self._pair(*action.pair)
            case Kind.FORWARD:
                self._end_forward(action, alone(self._forward(action), self._fill))
            case Kind.BACKWARD:
                self._end_backward(action, alone(self._backward(action, None), self._fill))
                self.backlog.finish(action)
            case Kind.INPUT_GRAD:
                queue = self.backlog.open(*key)
                self._end_backward(action, alone(self._backward(action, queue), self._fill))
            case Kind.WEIGHT_GRAD:
                with self._turn(action):
                    self.backlog.finish(action)
            case Kind.SEND_FORWARD:
                self.transfers.send(action, self.outputs.pop(key))
            case Kind.SEND_BACKWARD:
                self.transfers.send(action, self.input_gradients.pop(key))
            case Kind.RECV_FORWARD:
                self.inputs[key] = self.transfers.receive(action)
            case Kind.RECV_BACKWARD:
                self.gradients[key] = self.transfers.receive(action)
            case _:
                raise ValueError(f"an engine does not execute {action.kind}")

    def _pair(self, forward: Action, backward: Action) -> None:
        """Both in turn. Where `beside` asks for more, as many weight gradients run as the backward has left since.

        What it is told must not depend on how many there still are: other waits may have run some, and the order of
        launches would differ from rank to rank.
        """
        key = (backward.stage, backward.microbatch)
        first = self._forward(forward)
        second = self._backward(backward, self.backlog.open(*key))
        run = 0

        def fill() -> bool:
            nonlocal run
            owed = self.backlog.added(*key) - run
            run += owed
            for _ in range(owed):
                self._run_next()
            return owed > 0

        beside(first, second, fill)
        self._end_forward(forward, first.result)
        self._end_backward(backward, second.result)
        if backward.kind is Kind.BACKWARD:
            with self._turn(backward):
                self.backlog.finish(backward)

    def _fill(self) -> bool:
        """One pending weight gradient, while an all-to-all is on its way; whether there was any.

        Not in a step that is counted: what it holds at its peak must not depend on how fast messages are. And not where
        a reduction follows the gradients of a layer: the order of collectives must not depend on it either.
        """
        return not self.meter.counting and not self.engine.launches_in_weight_gradients and self._run_next()

    def _run_next(self) -> bool:
        """Run the next pending weight gradient; whether there was any."""
        if (pending := self.backlog.take()) is None:
            return False
        action, accumulate = pending
        with self._turn(action):
            accumulate()
        return True

    @contextmanager
    def _turn(self, action: Action) -> Iterator[None]:
        """Work in the name of `action`."""
        self.meter.action = action
        forward = action.kind is Kind.FORWARD
        with (
            self.meter.term("forward" if forward else "backward"),
            self.meter.born("activations" if forward else "temporary"),
        ):
            yield

    def _forward(self, action: Action) -> Running[Tensor | None]:
        key, tokens = (action.stage, action.microbatch), self.batch[action.microbatch]
        x = None if action.stage == 0 else self.inputs.pop(key)
        tape = self.tapes[key] = Tape(training=self.keeps)
        return Running(self.engine.stages[action.stage].forward(x, tokens, tape), partial(self._turn, action))

    def _end_forward(self, action: Action, output: Tensor | None) -> None:
        stage, microbatch = key = (action.stage, action.microbatch)
        tape = self.tapes[key] if self.keeps else self.tapes.pop(key)
        for name, total in self.totals.items():
            if (value := getattr(tape, name)) is not None:
                total += value
        if output is not None:
            local = self.schedule.rank_of(stage + 1, microbatch) == self.rank
            target = self.inputs if local else self.outputs
            target[(stage + 1, microbatch) if local else key] = output

    def _backward(self, action: Action, queue: list[Accumulate] | None) -> Running[Tensor | None]:
        key, engine = (action.stage, action.microbatch), self.engine
        tape = self.tapes.pop(key)
        tape.weight_gradients = queue
        gradient = None if action.stage == self.last else self.gradients.pop(key)
        steps = engine.stages[action.stage].backward(tape, gradient, engine.scale)
        return Running(steps, partial(self._turn, action))

    def _end_backward(self, action: Action, gradient: Tensor | None) -> None:
        stage, microbatch = key = (action.stage, action.microbatch)
        if gradient is not None:
            local = self.schedule.rank_of(stage - 1, microbatch) == self.rank
            target = self.gradients if local else self.input_gradients
            target[(stage - 1, microbatch) if local else key] = gradient

    def _describe(self, error: Exception) -> str:
        action = self.meter.action
        assert isinstance(action, Action)
        rank, place = self.engine.groups.rank, f"stage {action.stage}, micro-batch {action.microbatch}"
        return f"rank {rank}: action {action} ({place}) failed: {type(error).__name__}: {error}"

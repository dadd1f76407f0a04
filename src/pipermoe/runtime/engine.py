"""The engine: executes a lowered Schedule on one rank and leaves accumulated gradients in `param.grad`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipermoe.runtime.balance import Balance
from pipermoe.runtime.dispatch import Exchange
from pipermoe.runtime.gradients import Accumulate
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.model import DTYPES, MoELayer
from pipermoe.runtime.stage import Stage, Tape, drain
from pipermoe.runtime.support import check_model
from pipermoe.runtime.transfers import Transfers, acknowledgements
from pipermoe.runtime.weights import initialize
from pipermoe.schedule.action import SHARDING, Action, Kind, Schedule
from pipermoe.specs.errors import MachineError, UserError
from pipermoe.specs.mesh import split_layers
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

FORWARD_ONLY = frozenset({Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECV_FORWARD})


@dataclass(frozen=True, slots=True)
class StepResult:
    """This rank's share of the global means; the sum over all ranks is the loss of the whole batch.

    `loss` is cross-entropy (zero but on the last stage), `auxiliary` the load-balancing loss and `z_loss` the router
    z-loss before their weights (each stage's share of the means over micro-batches and MoE layers; the z-loss is 0 when
    it has no weight). Scalars on the engine's device.
    """

    loss: Tensor
    auxiliary: Tensor
    z_loss: Tensor


@dataclass(frozen=True, slots=True)
class Program:
    """One rank's elementary actions, and the sends known to have arrived after each."""

    schedule: Schedule
    actions: tuple[Action, ...]
    arrived: dict[int, tuple[Action, ...]]

    @classmethod
    def of(cls, schedule: Schedule, rank: int) -> Program:
        return cls(schedule, tuple(schedule.parts(rank)), acknowledgements(schedule, rank))


class Engine:
    """One rank of a training job: its stages, and the execution of its part of the schedule.

    Loss and gradients. The loss is the mean cross-entropy over all tokens of the global batch, plus `auxiliary_loss`
    times the mean over micro-batches and MoE layers of the load-balancing loss (runtime/balance.py says over which
    tokens), plus `z_loss` times the same mean of the router z-loss.
    Every rank's backward is scaled by 1 / (micro-batches * data_parallel); gradients must then be summed over
    dp (dense parameters) and edp (expert parameters), nothing else: an expert's gradient already holds the tokens of
    all ep ranks, which came through the all-to-all.

    Any schedule of F, B, I, W, sends and receives runs, with any number of stages on a rank. What users may ask for is
    narrower: runtime/support.py.

    `schedule` is lowered by schedule.communication.with_communication. `planned_counts[source][expert]`, if given, are
    the rows that each rank of the expert-parallel group sends to each expert, instead of what the router would choose.
    """

    def __init__(
        self,
        model: ModelSpec,
        train: TrainConfig,
        strategy: Strategy,
        schedule: Schedule,
        groups: ProcessGroups,
        *,
        device: torch.device | str = "cpu",
        planned_counts: Sequence[Sequence[int]] | None = None,
    ):
        check_model(model)
        _check_schedule(schedule, strategy)
        self.model, self.train, self.strategy, self.groups = model, train, strategy, groups
        self.device, self.dtype = torch.device(device), DTYPES[train.precision]
        self.meter = Meter()
        here = groups.coordinates
        self.training = Program.of(schedule, here.pp)
        self.validation = Program.of(_forward_only(schedule), here.pp)
        exchange = Exchange(groups.ep, model.moe.num_experts, self.meter, planned_counts)
        self.balance = Balance(train.auxiliary_loss_level, train.seq_len, groups.dp, self.meter)
        self.local_experts = exchange.local_experts
        split = split_layers(model.num_layers, schedule.num_stages, strategy.layer_split)
        self.stages = {
            stage: Stage(
                model,
                split[stage],
                exchange,
                seq_len=train.seq_len,
                dtype=self.dtype,
                device=self.device,
                recompute=strategy.recompute == "full",
                balance=self.balance,
                auxiliary_weight=train.auxiliary_loss / len(model.moe_layers),
                z_weight=train.z_loss / len(model.moe_layers),
            )
            for stage in schedule.stages_of(here.pp)
        }
        initialize(
            self.named_parameters(),
            seed=train.seed,
            num_layers=model.num_layers,
            first_expert=here.ep * exchange.local_experts,
        )

    @property
    def microbatches(self) -> int:
        return self.training.schedule.microbatches

    @property
    def scale(self) -> float:
        """The weight of one micro-batch's mean in the global mean."""
        return 1.0 / (self.microbatches * self.strategy.data_parallel)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, parameter) of all that gradients train and this rank holds, in the order of the layers."""
        for stage in self.stages.values():
            for name, parameter in stage.model.named_parameters():
                if parameter.requires_grad:
                    yield name, parameter

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """All that a model is: its parameters, and the correction biases that the balance of load moves."""
        for stage in self.stages.values():
            yield from stage.model.named_state()

    def step(self, batch: Tensor) -> StepResult:
        """Forward and backward of one step; gradients are added to `param.grad`.

        `batch` holds this dp rank's tokens, (microbatches, micro_batch_size, seq_len + 1) int64, the same on every
        pipeline rank: each position but the last predicts the next.
        """
        self.balance.begin_step()
        return _Execution(self, self.training, batch).run()

    def move_correction_biases(self) -> None:
        """Move the routers' correction biases by the load of the last step. Collective over each stage's ranks."""
        layers = [layer for stage in self.stages.values() for layer in stage.model.layers.values()]
        routers = [layer.router for layer in layers if isinstance(layer, MoELayer)]
        self.balance.move_correction_biases(routers, self.train.balance_rate)

    @torch.no_grad()
    def evaluate(self, batch: Tensor) -> StepResult:
        """The loss of a batch like that of `step`, without gradients."""
        return _Execution(self, self.validation, batch).run()


class _Execution:
    """One pass over a program: what is between the actions of a step and gone after it."""

    def __init__(self, engine: Engine, program: Program, batch: Tensor):
        expected = (engine.microbatches, engine.strategy.micro_batch_size, engine.train.seq_len + 1)
        if tuple(batch.shape) != expected:
            raise ValueError(f"batch has shape {tuple(batch.shape)}; the engine was built for {expected}")
        self.engine, self.program, self.batch = engine, program, batch
        self.schedule, self.meter = program.schedule, engine.meter
        self.rank, self.last = engine.groups.coordinates.pp, program.schedule.num_stages - 1
        self.keeps = program is engine.training
        self.transfers = Transfers(program.schedule, engine.groups, engine.meter)
        self.shape = torch.Size((expected[1] * engine.train.seq_len, engine.model.hidden_size))
        # Keyed by (stage, microbatch): what a forward or backward action needs, and what a send carries away.
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.gradients: dict[tuple[int, int], Tensor] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.input_gradients: dict[tuple[int, int], Tensor] = {}
        self.tapes: dict[tuple[int, int], Tape] = {}
        self.weight_gradients: dict[tuple[int, int], list[Accumulate]] = {}
        self.loss = torch.zeros((), device=engine.device)
        self.auxiliary = torch.zeros((), device=engine.device)
        self.z_loss = torch.zeros((), device=engine.device)

    def run(self) -> StepResult:
        for i, action in enumerate(self.program.actions):
            self.meter.action = action
            try:
                self._execute(action)
                self.transfers.settle(self.program.arrived.get(i, ()))
            except UserError:
                raise
            except Exception as error:
                raise MachineError(self._describe(action, error)) from error
        self.transfers.settle_all()
        scale, moe_layers = self.engine.scale, len(self.engine.model.moe_layers)
        return StepResult(self.loss * scale, self.auxiliary * (scale / moe_layers), self.z_loss * (scale / moe_layers))

    def _execute(self, action: Action) -> None:
        key = (action.stage, action.microbatch)
        match action.kind:
            case Kind.FORWARD:
                with self.meter.term("forward"), self.meter.born("activations"):
                    self._forward(*key)
            case Kind.BACKWARD | Kind.INPUT_GRAD:
                with self.meter.term("backward"), self.meter.born("temporary"):
                    self._backward(*key, defer=action.kind is Kind.INPUT_GRAD)
            case Kind.WEIGHT_GRAD:
                with self.meter.term("backward"), self.meter.born("temporary"):
                    for accumulate in self.weight_gradients.pop(key):
                        accumulate()
            case Kind.SEND_FORWARD:
                self.transfers.send(action, self.outputs.pop(key))
            case Kind.SEND_BACKWARD:
                self.transfers.send(action, self.input_gradients.pop(key))
            case Kind.RECV_FORWARD:
                self.inputs[key] = self._receive(action)
            case Kind.RECV_BACKWARD:
                self.gradients[key] = self._receive(action)
            case _:
                raise ValueError(f"an engine does not execute {action.kind}")

    def _forward(self, stage: int, microbatch: int) -> None:
        key, tokens = (stage, microbatch), self.batch[microbatch]
        x = tokens[:, :-1].flatten() if stage == 0 else self.inputs.pop(key)
        targets = tokens[:, 1:].flatten() if stage == self.last else None
        tape = Tape(training=self.keeps)
        output = drain(self.engine.stages[stage].forward(x, targets, tape))
        assert tape.auxiliary is not None
        assert tape.z_loss is not None
        self.auxiliary += tape.auxiliary
        self.z_loss += tape.z_loss
        if tape.loss is not None:
            self.loss += tape.loss
        if self.keeps:
            self.tapes[key] = tape
        if output is not None:
            local = self.schedule.rank_of(stage + 1, microbatch) == self.rank
            target = self.inputs if local else self.outputs
            target[(stage + 1, microbatch) if local else key] = output

    def _backward(self, stage: int, microbatch: int, *, defer: bool) -> None:
        key = (stage, microbatch)
        tape = self.tapes.pop(key)
        if defer:
            tape.weight_gradients = self.weight_gradients[key] = []
        gradient = None if stage == self.last else self.gradients.pop(key)
        result = drain(self.engine.stages[stage].backward(tape, gradient, self.engine.scale))
        if result is not None:
            local = self.schedule.rank_of(stage - 1, microbatch) == self.rank
            target = self.gradients if local else self.input_gradients
            target[(stage - 1, microbatch) if local else key] = result

    def _receive(self, action: Action) -> Tensor:
        return self.transfers.receive(action, self.shape, self.engine.dtype, self.engine.device)

    def _describe(self, action: Action, error: Exception) -> str:
        where = (
            f"rank {self.engine.groups.rank}: action {action} (stage {action.stage}, micro-batch {action.microbatch})"
        )
        return f"{where} failed: {type(error).__name__}: {error}"


def _forward_only(schedule: Schedule) -> Schedule:
    """The forward actions of a schedule in their order: legal, as no forward waits for a backward's data."""
    kept = tuple(
        tuple(part for part in schedule.parts(rank) if part.kind in FORWARD_ONLY) for rank in range(schedule.num_ranks)
    )
    return replace(schedule, ranks=kept)


def _check_schedule(schedule: Schedule, strategy: Strategy) -> None:
    """A schedule this engine can execute with this strategy."""
    if schedule.num_ranks != strategy.pipeline_parallel:
        raise UserError(
            f"schedule {schedule.name} is for {schedule.num_ranks} pipeline ranks, "
            f"the strategy has pipeline_parallel = {strategy.pipeline_parallel}"
        )
    if schedule.mirror_rank:
        raise UserError(f"schedule {schedule.name} holds every stage twice, which this runtime does not execute")
    if any(part.kind in SHARDING for rank in range(schedule.num_ranks) for part in schedule.parts(rank)):
        raise UserError(f"schedule {schedule.name} shards weights, which this runtime does not execute")

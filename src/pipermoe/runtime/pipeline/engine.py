"""The engine: executes a lowered Schedule on one rank and leaves accumulated gradients in `param.grad`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipermoe.runtime.balance import Balance
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.modules.model import DTYPES, MoELayer
from pipermoe.runtime.optimizer.sharding import Sharding, flatten, unit_of
from pipermoe.runtime.pipeline.deduplicated import Deduplicated
from pipermoe.runtime.pipeline.dispatch import AllToAll, ExpertGroup
from pipermoe.runtime.pipeline.execution import Execution, Program, StepResult
from pipermoe.runtime.pipeline.flight import Collective, Transport
from pipermoe.runtime.pipeline.planned_exchange import PlannedExchange
from pipermoe.runtime.pipeline.stage import Stage
from pipermoe.runtime.support import check_device, check_model
from pipermoe.runtime.weights import initialize
from pipermoe.schedule.action import SHARDING, Kind, Schedule
from pipermoe.specs.errors import UserError
from pipermoe.specs.mesh import split_layers
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

FORWARD_ONLY = frozenset({Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECV_FORWARD})


class Engine:
    """One rank of a training job: its stages, and the execution of its part of the schedule.

    Loss and gradients. The loss is the mean cross-entropy over all tokens of the global batch, plus `auxiliary_loss`
    times the mean over micro-batches and MoE layers of the load-balancing loss (runtime/balance.py says over which
    tokens), plus `z_loss` times the same mean of the router z-loss.
    Every rank's backward is scaled by 1 / (micro-batches * data_parallel); gradients must then be summed over
    dp (dense parameters) and edp (expert parameters), nothing else: an expert's gradient already holds the tokens of
    all ep ranks, which came through the all-to-all.

    Any schedule of F, B, I, W, their pairs, sends and receives runs, with any number of stages on a rank.

    `schedule` is lowered by schedule.communication.with_communication. `planned_counts[source][expert]`, if given, are
    the rows that each rank of the expert-parallel group sends to each expert, instead of what the router would choose.
    `transport` carries the all-to-alls; if not given, what the strategy says.
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
        transport: Transport | None = None,
    ):
        check_model(model)
        _check_schedule(schedule, strategy)
        self.model, self.train, self.strategy, self.groups = model, train, strategy, groups
        self.device, self.dtype = torch.device(device), DTYPES[train.precision]
        check_device(model, self.device.type)
        self.meter = Meter()
        here = groups.coordinates
        self.training = Program.of(schedule, here.pp)
        self.validation = Program.of(_forward_only(schedule), here.pp)
        group = ExpertGroup(
            groups.ep.rank(),
            groups.ep.size(),
            model.moe.num_experts,
            model.moe.top_k,
            transport or _transport(strategy, groups.ep, self.meter, dry=planned_counts is not None),
            self.meter,
            train.capacity_factor,
            planned_counts,
        )
        dispatcher = (
            Deduplicated(group) if strategy.dispatcher == "deduplicated" and group.ranks > 1 else AllToAll(group)
        )
        self.balance = Balance(train.auxiliary_loss_level, train.seq_len, groups.dp, self.meter)
        self.local_experts = group.local_experts
        self.sharding = Sharding(self.meter)
        split = split_layers(model.num_layers, schedule.num_stages, strategy.layer_split)
        self.stages = {
            stage: Stage(
                model,
                split[stage],
                dispatcher,
                self.sharding,
                seq_len=train.seq_len,
                dtype=self.dtype,
                device=self.device,
                strategy=strategy,
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
            experts_of=lambda name: range(here.ep * group.local_experts, model.moe.num_experts),
        )
        self.flats = flatten(self.named_parameters(), groups, strategy)
        self.sharding.take(self.flats, tied=model.tie_word_embeddings)

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

    def correction_biases(self) -> Iterator[tuple[str, Tensor]]:
        """(global name, tensor) of the routers' biases that the balance of load moves."""
        for stage in self.stages.values():
            yield from stage.model.correction_biases()

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """All that a model is: its parameters, and the correction biases that the balance of load moves.

        Weights that are sharded are here while their turn lasts, and what is written into them then is kept: a
        collective over the ranks that hold the shards. A tensor that is kept beyond it stays as it was.
        """
        for unit, named in groupby(self.named_parameters(), key=lambda item: unit_of(item[0])):
            with self.sharding.lent(unit):
                yield from ((name, parameter.detach()) for name, parameter in named)
        self.sharding.settle()
        yield from self.correction_biases()

    def step(self, batch: Tensor) -> StepResult:
        """Forward and backward of one step; gradients are added to `param.grad`.

        `batch` holds this dp rank's tokens, (microbatches, micro_batch_size, seq_len + 1) int64, the same on every
        pipeline rank: each position but the last predicts the next.
        """
        self.balance.begin_step()
        return Execution(self, self.training, batch).run()

    def move_correction_biases(self) -> None:
        """Move the routers' correction biases by the load of the last step. Collective over each stage's ranks."""
        layers = [layer for stage in self.stages.values() for layer in stage.model.layers.values()]
        routers = [layer.router for layer in layers if isinstance(layer, MoELayer)]
        self.balance.move_correction_biases(routers, self.train.balance_rate)

    @torch.no_grad()
    def evaluate(self, batch: Tensor) -> StepResult:
        """The loss of a batch like that of `step`, without gradients."""
        return Execution(self, self.validation, batch).run()


def _forward_only(schedule: Schedule) -> Schedule:
    """The forward actions of a schedule in their order: legal, as no forward waits for a backward's data."""
    kept = tuple(
        tuple(part for part in schedule.parts(rank) if part.kind in FORWARD_ONLY) for rank in range(schedule.num_ranks)
    )
    return replace(schedule, ranks=kept)


def _transport(strategy: Strategy, group: dist.ProcessGroup, meter: Meter, *, dry: bool) -> Transport:
    """Where counts are planned nothing need travel, and torch's collective counts the same bytes."""
    if strategy.exchange == "planned" and group.size() > 1 and not dry:
        return PlannedExchange(group, meter)
    return Collective(group)


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

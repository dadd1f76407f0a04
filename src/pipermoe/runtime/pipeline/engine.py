"""The engine: executes a lowered Schedule on one rank and leaves accumulated gradients in `param.grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipermoe.modules.initialize import initialize
from pipermoe.modules.model import DTYPES, MoELayer
from pipermoe.modules.names import EMBEDDING, is_expert, layer_of, unit_of
from pipermoe.runtime.balance import Balance
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.layout.carry import Carrier
from pipermoe.runtime.layout.dispatch import LayoutDispatch
from pipermoe.runtime.layout.lay_out import Draw, LaidOut, Maker
from pipermoe.runtime.layout.tally import Tally
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.optimizer.flat_parameters import FlatParameters
from pipermoe.runtime.optimizer.sharding import Sharding, Unit, flatten
from pipermoe.runtime.pipeline.deduplicated import Deduplicated
from pipermoe.runtime.pipeline.deduplicated_by_node import DeduplicatedByNode
from pipermoe.runtime.pipeline.dispatch import AllToAll, Dispatcher, ExpertGroup
from pipermoe.runtime.pipeline.execution import Execution, Program, StepResult
from pipermoe.runtime.pipeline.flight import Collective, Transport
from pipermoe.runtime.pipeline.planned_exchange import PlannedExchange
from pipermoe.runtime.pipeline.stage import Stage
from pipermoe.runtime.support import check_layable, check_model
from pipermoe.schedule.action import Kind, Schedule
from pipermoe.specs.errors import UserError
from pipermoe.specs.mesh import split_layers
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import Mechanism, TrainConfig

FORWARD_ONLY = frozenset({Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECV_FORWARD})


class Engine:
    """One rank of a training job: its stages, and the execution of its part of the schedule.

    Loss and gradients. The loss is the mean cross-entropy over all tokens of the global batch, plus `auxiliary_loss`
    times the mean over micro-batches and MoE layers of the load-balancing loss (runtime/balance.py says over which
    tokens), plus `z_loss` times the same mean of the router z-loss, plus `mtp_loss_weight` times the mean over depths
    of the cross-entropies of multi-token prediction.
    Every rank's backward is scaled by 1 / (micro-batches * data_parallel); gradients are then summed over dp (dense
    parameters) and edp (expert parameters), nothing else: an expert's gradient already holds the tokens of all ep
    ranks, which came through the all-to-all.

    Any schedule of F, B, I, W, their pairs, sends and receives runs, with any number of stages on a rank. When weights
    are gathered and gradients reduced follows from the strategy's ZeRO levels, whether the schedule says it or not.

    `schedule` is lowered by schedule.communication.with_communication. `planned_counts[source][expert]`, if given, are
    the rows that each rank of the expert-parallel group sends to each expert, instead of what the router would choose.
    `transport` carries the all-to-alls; if not given, what the strategy says. `laid_out`: how experts are laid out, if
    they are not in order, the same number on every rank.
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
        laid_out: LaidOut | None = None,
    ):
        check_model(model)
        _check_schedule(schedule, strategy)
        if laid_out is not None:
            check_layable(strategy, laid_out.mechanism)
        self.model, self.train, self.strategy, self.groups = model, train, strategy, groups
        self.device, self.dtype = torch.device(device), DTYPES[train.precision]
        self.meter = Meter()
        self.training = Program.of(schedule, groups.coordinates.pp)
        self.validation = Program.of(_forward_only(schedule), groups.coordinates.pp)
        self.transport = transport or _transport(strategy, groups.ep, self.meter, dry=planned_counts is not None)
        group = self._expert_group(planned_counts)
        self.local_experts = group.local_experts
        self.placement = None if laid_out is None else laid_out.placement(group.rank)
        self.spill = None if laid_out is None else laid_out.spill
        carrier = Carrier(group.transport, group.rank, group.ranks, self.meter)
        self.tally = Tally(len(model.routers))
        dispatcher = self._dispatcher(group, carrier)
        self.balance = Balance(train.auxiliary_loss_level, train.seq_len, groups.dp, self.meter)
        self.sharding = Sharding(self.meter)
        self.stages = self._build_stages(schedule, dispatcher)
        last = schedule.num_stages - 1
        together = last in schedule.stages_of(schedule.stage_rank[0])  # of every rank that holds an end
        if model.embeds_twice and together and 0 < last in self.stages:
            self.stages[last].model.share_embedding(self.stages[0].model)
        self.copied = {EMBEDDING} if model.embeds_twice and not together else set()
        draw = partial(initialize, seed=train.seed, num_layers=model.num_layers)
        draw(self.named_parameters(), self.experts_of)
        self.flats = self._flatten(laid_out.mechanism if laid_out else None, carrier, draw)

    def _expert_group(self, planned_counts: Sequence[Sequence[int]] | None) -> ExpertGroup:
        ep, moe = self.groups.ep, self.model.moe
        return ExpertGroup(
            ep.rank(),
            ep.size(),
            moe.num_experts,
            moe.top_k,
            self.transport,
            self.meter,
            self.train.capacity_factor,
            planned_counts,
        )

    def _build_stages(self, schedule: Schedule, dispatcher: Callable[[str], Dispatcher]) -> dict[int, Stage]:
        model, train = self.model, self.train
        split = split_layers(model.num_layers, schedule.num_stages, self.strategy.layer_split)
        return {
            stage: Stage(
                model,
                split[stage],
                self.local_experts if self.placement is None else self.placement.slots,
                dispatcher,
                self.sharding,
                seq_len=train.seq_len,
                dtype=self.dtype,
                device=self.device,
                strategy=self.strategy,
                balance=self.balance,
                auxiliary_weight=train.auxiliary_loss / len(model.routers),
                z_weight=train.z_loss / len(model.routers),
                mtp_weight=train.mtp_loss_weight / max(1, model.mtp_layers),
            )
            for stage in schedule.stages_of(self.groups.coordinates.pp)
        }

    def _dispatcher(self, group: ExpertGroup, carrier: Carrier) -> Callable[[str], Dispatcher]:
        """How the tokens of each layer, by its unit's name, meet their experts."""
        if (placement := self.placement) is not None:
            layers = {f"layers.{layer}": index for index, layer in enumerate(self.model.routers)}
            return lambda unit: LayoutDispatch(group, placement, layers[unit], carrier, self.tally, self.spill)
        everywhere = _same_dispatcher(self.strategy, group, self.groups)
        return lambda unit: everywhere

    def _flatten(self, mechanism: Mechanism | None, carrier: Carrier, draw: Draw) -> list[FlatParameters]:
        """What the optimizer updates; `sharding` takes charge of it, and of what else is brought for every use."""
        moving = mechanism is not None
        fixed = [each for each in self.named_parameters() if not (moving and is_expert(each[0]))]
        flats = flatten(fixed, self.groups, self.strategy, self.copied)
        tied = self.model.tie_word_embeddings
        forwards = [part for part in self.training.parts if part.kind is Kind.FORWARD]
        filled = [unit for part in forwards for unit in self.stages[part.stage].units]
        self.sharding.reduce_early(flats, filled, tied=tied)
        visitors: list[Unit] = []
        if mechanism is not None and self.placement is not None:
            experts = [each for each in self.named_parameters() if is_expert(each[0])]
            maker = Maker(mechanism, self.placement, self.model.routers, self.groups, self.strategy, carrier)
            held, visitors = maker.lay_out(experts, draw)
            flats += held
        self.sharding.take([*flats, *visitors], tied=tied)
        return flats

    @property
    def microbatches(self) -> int:
        return self.training.schedule.microbatches

    @property
    def scale(self) -> float:
        """The weight of one micro-batch's mean in the global mean."""
        return 1.0 / (self.microbatches * self.strategy.data_parallel)

    @property
    def launches_in_weight_gradients(self) -> bool:
        """Whether collectives stand among the weight gradients, which may then run at no other time on one rank."""
        return self.sharding.scatters_any or self.spill is not None

    def experts_of(self, name: str) -> Sequence[int]:
        """The logical expert of each row of this expert parameter on this rank."""
        if self.placement is not None:
            return self.placement.held(self.model.routers.index(layer_of(name)))
        first = self.groups.coordinates.ep * self.local_experts
        return range(first, first + self.local_experts)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(global name, parameter) of all that gradients train and this rank holds, in the order of the layers."""
        held = {name: each for stage in self.stages.values() for name, each in stage.model.named_parameters()}
        yield from ((name, each) for name, each in held.items() if each.requires_grad)

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

        Sums of gradients over ranks are still on their way: `FlatParameters.reduce_gradients` ends them.

        `batch` holds this dp rank's tokens, (microbatches, micro_batch_size, seq_len + 1) int64, the same on every
        pipeline rank: each position but the last predicts the next.
        """
        self.balance.begin_step()
        with self.tally.step():
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


def _same_dispatcher(strategy: Strategy, group: ExpertGroup, groups: ProcessGroups) -> Dispatcher:
    """Of all layers, when their experts lie in order."""
    if strategy.dispatcher == "all_to_all" or group.ranks == 1:
        return AllToAll(group)
    if strategy.ranks_per_copy == 1:
        return Deduplicated(group)

    def part(members: dist.ProcessGroup, num_experts: int) -> ExpertGroup:
        transport = _transport(strategy, members, group.meter, dry=group.planned_counts is not None)
        return ExpertGroup(members.rank(), members.size(), num_experts, group.top_k, transport, group.meter)

    inside = part(groups.ep_inside, group.local_experts * strategy.ranks_per_copy)
    return DeduplicatedByNode(group, part(groups.ep_across, group.num_experts), inside)


def _check_schedule(schedule: Schedule, strategy: Strategy) -> None:
    """A schedule this engine can execute with this strategy."""
    if schedule.num_ranks != strategy.pipeline_parallel:
        raise UserError(
            f"schedule {schedule.name} is for {schedule.num_ranks} pipeline ranks, "
            f"the strategy has pipeline_parallel = {strategy.pipeline_parallel}"
        )

"""The cost of one training step: durations per stage, and the exact StepReport.

`step_costs` prices many strategies of one pipeline at once, `outline` simulates one of them, `predict` reports all its
ranks; resources/bound.py bounds any number. One strategy costs the same alone as among others. Arrays are (rows,
stages) unless said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.activations.sizes import Recompute, sizes_of
from pipermoe.resources.communication import (
    Call,
    arrival_work,
    exchange_seconds,
    exchanges,
    message_bytes,
    send_seconds,
    sync_seconds,
    traffic,
)
from pipermoe.resources.compute import layer_seconds, stage_flops, stage_seconds
from pipermoe.resources.gathers import weight_gathers
from pipermoe.resources.memory import rank_memory
from pipermoe.resources.rates import pass_seconds
from pipermoe.resources.stages import StageShapes, stage_shapes
from pipermoe.resources.states import state_elements
from pipermoe.schedule.action import Kind
from pipermoe.schedule.builders import schedule_of
from pipermoe.schedule.durations import Durations, WorkTable
from pipermoe.schedule.shared_host import simulate_shared_host
from pipermoe.schedule.timeline import Timeline, simulate
from pipermoe.schedule.traits import stages_of_ranks, ways
from pipermoe.specs.mesh import coordinates, split_layers
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.report import MemoryCategory, RankReport, StepReport, Term, Traffic
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import SCHEDULE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

# The measured pass "gradient_norm" takes the norm of gradients, scales and zeroes them: each goes over them once.
NORM_SHARE = 1 / 3

CostRow = dict[str, list[float]]  # of one strategy: a field of StepCosts and its numbers


@dataclass(frozen=True, slots=True)
class ClosingCosts:
    """The end of the step on every pipeline rank: `reduce` (gradients), `norm` (compute), `flags` (rows, 1; the
    world-wide reduction of the norm, which every rank waits for), `update` (compute), `gather` (weights).
    """

    reduce: NDArray
    norm: NDArray
    flags: NDArray
    update: NDArray
    gather: NDArray


@dataclass(frozen=True, slots=True)
class StepCosts(ClosingCosts):
    """What one micro-batch costs on every stage, and the end of the step on every pipeline rank (rows, ranks).

    (rows, stages): `forward`, `input_grad`, `weight_grad` (compute alone on the device), `forward_exchange`,
    `backward_exchange` (collectives inside a stage), `forward_carried`, `backward_carried` (the same, as work of cores
    that ranks share). (rows, stages - 1): `send` is one message to the next stage, `arrival` its receiver's work.
    """

    forward: NDArray
    input_grad: NDArray
    weight_grad: NDArray
    forward_exchange: NDArray
    backward_exchange: NDArray
    forward_carried: NDArray
    backward_carried: NDArray
    send: NDArray
    arrival: NDArray


@dataclass(frozen=True, slots=True)
class Outline:
    """A step, and of every pipeline rank the seconds by term and the bytes at the peak: all its ranks are alike."""

    step_seconds: float
    seconds: list[dict[Term, float]]
    memory_bytes: list[dict[MemoryCategory, int]]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the stages of a uniform table lie: `stages` as they are, `ranks` as pipeline ranks hold them."""

    stages: StageShapes
    ranks: StageShapes
    stages_of: tuple[tuple[int, ...], ...]


def placement_of(model: ModelSpec, table: StrategyTable) -> Placement:
    """The stages that all rows of a uniform table share."""
    stages_of = stages_of_ranks(
        SCHEDULE_NAMES[int(table.schedule[0])], int(table.pipeline_parallel[0]), int(table.virtual_stages[0])
    )
    shapes = stage_shapes(model, int(table.num_stages[0]), table.splits[int(table.layer_split[0])])
    return Placement(shapes, shapes.of_ranks(stages_of), stages_of)


def step_costs(
    model: ModelSpec, platform: Platform, train: TrainConfig, table: StrategyTable, imbalance: float = 1.0
) -> StepCosts:
    """The durations of every row of a uniform table; `imbalance` is the busiest rank's rows over the mean."""
    place, device, precision = placement_of(model, table), platform.device, train.precision
    sizes = sizes_of(model, train, table, imbalance=imbalance)
    compute = stage_seconds(layer_seconds(device, precision, sizes, Recompute.of(table)), place.stages)
    exchange = exchange_seconds(platform, exchanges(sizes, place.stages), table)
    closing = closing_costs(model, platform, train, place.ranks, table)
    return StepCosts(
        forward=compute.forward,
        input_grad=compute.input_grad,
        weight_grad=compute.weight_grad,
        forward_exchange=exchange.forward,
        backward_exchange=exchange.backward,
        forward_carried=exchange.forward_carried,
        backward_carried=exchange.backward_carried,
        send=send_seconds(platform, table, message_bytes(sizes), place.stages_of),
        arrival=arrival_work(platform, table, place.stages_of),
        **{field.name: getattr(closing, field.name) for field in fields(ClosingCosts)},
    )


def closing_costs(
    model: ModelSpec, platform: Platform, train: TrainConfig, ranks: StageShapes, table: StrategyTable
) -> ClosingCosts:
    """The end of the step on ranks that hold `ranks`, for every row of any table."""
    device, precision = platform.device, train.precision
    states = state_elements(model, ranks, table)
    reduce, flags, gather = sync_seconds(platform, train, ranks, table, states)
    return ClosingCosts(
        reduce=reduce,
        norm=NORM_SHARE * pass_seconds(device, precision, "gradient_norm", states.owned)[0],
        flags=flags,
        update=pass_seconds(device, precision, "optimizer", states.updated)[0]
        + (1 - NORM_SHARE) * pass_seconds(device, precision, "gradient_norm", states.gradients)[0],
        gather=gather,
    )


def compute_slots(platform: Platform, world_size: int) -> float:
    """How many of `world_size` ranks compute at full rate at the same time, over all hosts that they fill."""
    hosts = -(-world_size // platform.host.ranks)
    return max(1.0, platform.host.compute_slots * hosts)


def peak_flops_per_rank(platform: Platform, train: TrainConfig, world_size: int) -> float:
    """The basis of MFU: FLOP/s at best of one rank, or of its share where ranks share cores."""
    share = min(1.0, compute_slots(platform, world_size) / world_size)
    return platform.device.peak_flops_per_s[train.precision] * share


def step_seconds_by_term(
    platform: Platform, train: TrainConfig, strategy: Strategy, costs: StepCosts
) -> tuple[float, list[dict[Term, float]]]:
    """The simulated step of a single row of costs: its seconds, and for every pipeline rank the seconds by term."""
    schedule = schedule_of(strategy, train.global_batch_size)
    [cost] = cost_rows(costs)
    slots = compute_slots(platform, strategy.world_size)
    durations = durations_of(cost, strategy.num_stages)
    if slots >= strategy.world_size:
        timeline = simulate(schedule, durations)
    else:
        timeline = simulate_shared_host(schedule, durations, slots, strategy.ranks_per_stage)
    return _after_pipeline(timeline, durations, cost, slots, strategy.ranks_per_stage)


def cost_rows(costs: StepCosts) -> list[CostRow]:
    """The costs of each row by name."""
    columns = {field.name: getattr(costs, field.name).tolist() for field in fields(StepCosts)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def durations_of(cost: CostRow, stages: int) -> Durations:
    """What a simulation reads of the costs of one row. What shared cores carry is computing to it."""
    arrival = cost["arrival"][: stages - 1]
    ahead = zip(cost["forward"], cost["forward_carried"], [0.0, *arrival], strict=True)
    back = zip(cost["input_grad"], cost["backward_carried"], [*arrival, 0.0], strict=True)
    return Durations(
        forward=tuple(map(sum, ahead)),
        input_grad=tuple(map(sum, back)),
        weight_grad=tuple(cost["weight_grad"]),
        forward_exchange=tuple(cost["forward_exchange"]),
        backward_exchange=tuple(cost["backward_exchange"]),
        transfer=tuple(_per_sending_stage(cost["send"], stages)),
    )


def _on_cores(cost: CostRow) -> Durations:
    """Computing, and in the place of exchanges the collectives that the cores carry beside it."""
    return Durations(
        forward=tuple(cost["forward"]),
        input_grad=tuple(cost["input_grad"]),
        weight_grad=tuple(cost["weight_grad"]),
        forward_exchange=tuple(cost["forward_carried"]),
        backward_exchange=tuple(cost["backward_carried"]),
    )


def _per_sending_stage(boundaries: list[float], stages: int) -> list[float]:
    """Seconds of a message that a stage sends to either neighbour: the slower of the two links."""
    links = boundaries[: stages - 1]
    return [max(links[max(0, s - 1) : s + 1], default=0.0) for s in range(stages)]


def _after_pipeline(
    timeline: Timeline, durations: Durations, cost: CostRow, slots: float, ranks_per_stage: int
) -> tuple[float, list[dict[Term, float]]]:
    """The end of the step, and everything by term, per stage."""
    stages, count = range(timeline.schedule.num_ranks), timeline.schedule.num_stages
    work, own = durations.per_stage(count), _on_cores(cost).per_stage(count)
    ends = [max(timeline.end[s]) for s in stages]
    agreed, updates, done = close_step(ends, cost, slots, ranks_per_stage)
    step = max(done)
    terms = []
    for s in stages:
        forward, backward, exchange = _spent(timeline, s, work, own)
        terms.append(
            {
                "forward": forward,
                "backward": backward,
                "all_to_all": exchange,
                # A rank that is done early waits for the others in the next step's pipeline.
                "pipeline_wait": ends[s] - forward - backward - exchange + step - done[s],
                "gradient_sync": agreed - ends[s] + cost["gather"][s],
                "optimizer": updates[s],
                "other": 0.0,
            }
        )
    return step, terms


def close_step(
    ends: list[float], cost: CostRow, slots: float, ranks_per_stage: int
) -> tuple[float, list[float], list[float]]:
    """After the pipeline ranks' `ends`: reduce, agree on the norm, update, gather.

    When all have agreed; the seconds of each rank's update; when each rank is done.
    """
    ranks = range(len(ends))
    crowding = max(1.0, len(ends) * ranks_per_stage / slots)
    norms = [cost["norm"][r] * crowding for r in ranks]
    agreed = max(ends[r] + cost["reduce"][r] + norms[r] for r in ranks) + cost["flags"][0]
    updates = shared_seconds(cost["update"], ranks_per_stage, slots)
    return agreed, updates, [agreed + updates[r] + cost["gather"][r] for r in ranks]


def _spent(timeline: Timeline, rank: int, work: WorkTable, own: WorkTable) -> tuple[float, float, float]:
    """Seconds of forward and backward work of a pipeline rank, and of the collectives that nothing hides.

    What an action took on the cores is divided as its parts in `own` would take alone: computing, and the collectives
    that the cores carry. What `work` has beyond these, the arrival of messages, is none of the three.
    """
    forward = backward = exchanged = 0.0
    for action, start, end in zip(timeline.schedule.ranks[rank], timeline.start[rank], timeline.end[rank], strict=True):
        alone, exposed = work.work(action)
        stretch = (end - start - exposed) / alone if alone else 1.0
        exchanged += exposed
        for part in action.parts:
            computed = stretch * own.compute[part.kind][part.stage]
            ahead = part.kind is Kind.FORWARD
            forward, backward = forward + ahead * computed, backward + (not ahead) * computed
            exchanged += stretch * own.exchange[part.kind][part.stage]
    return forward, backward, exchanged


def shared_seconds(work: list[float], ranks_per_stage: int, slots: float) -> list[float]:
    """When each stage's ranks finish `work[s]` seconds of computing if all start together on `slots` shared cores.

    n computing ranks advance at rate min(1, slots / n) each.
    """
    finish = [0.0] * len(work)
    clock = done = 0.0
    order = sorted(range(len(work)), key=work.__getitem__)
    for position, stage in enumerate(order):
        busy = (len(order) - position) * ranks_per_stage
        clock += (work[stage] - done) * max(1.0, busy / slots)
        done = work[stage]
        finish[stage] = clock
    return finish


def outline(
    model: ModelSpec, platform: Platform, train: TrainConfig, strategy: Strategy, imbalance: float = 1.0
) -> Outline:
    """What one step of `strategy` takes and holds; `imbalance` is the busiest rank's rows over the mean."""
    table = StrategyTable.of([strategy])
    costs = step_costs(model, platform, train, table, imbalance)
    step, terms = step_seconds_by_term(platform, train, strategy, costs)
    states = state_elements(model, placement_of(model, table).ranks, table)
    return Outline(step, terms, rank_memory(model, train, table, states, imbalance=imbalance))


def predict(
    model: ModelSpec, platform: Platform, train: TrainConfig, strategy: Strategy, imbalance: float = 1.0
) -> StepReport:
    """What one step of `strategy` costs, rank by rank; `imbalance` is the busiest rank's rows over the mean."""
    table, found = StrategyTable.of([strategy]), outline(model, platform, train, strategy, imbalance)
    place, memory = placement_of(model, table), found.memory_bytes
    states = state_elements(model, place.ranks, table)
    sizes, sends = sizes_of(model, train, table, imbalance=imbalance), messages_sent(place.stages_of)
    gathers, flops = weight_gathers(model, train, strategy), step_flops(model, train, strategy, int(sizes.computed[0]))
    stages = []  # by place in the expert group, where that matters, and pipeline rank
    for ep_rank in range(strategy.expert_parallel if strategy.dispatcher == "deduplicated" else 1):
        calls = traffic(train, sizes, place.ranks, table, states, sends, ep_rank) | gathers
        stages.append(
            [
                RankReport(
                    rank=pp,
                    peak_bytes=sum(memory[pp].values()),
                    memory_bytes=memory[pp],
                    flops=sum(flops[stage] for stage in held),
                    traffic=_of_rank(calls, pp),
                    seconds=found.seconds[pp],
                )
                for pp, held in enumerate(place.stages_of)
            ]
        )
    where = [coordinates(strategy, rank) for rank in range(strategy.world_size)]
    ranks = [stages[at.ep % len(stages)][at.pp].model_copy(update={"rank": rank}) for rank, at in enumerate(where)]
    return StepReport(step_seconds=found.step_seconds, ranks=tuple(ranks))


def _of_rank(calls: dict[str, Call], pp: int) -> dict[str, Traffic]:
    """What a pipeline rank calls at all."""
    sent = {key: Traffic(calls=int(each.calls[0, pp]), bytes=int(each.bytes[0, pp])) for key, each in calls.items()}
    return {key: each for key, each in sent.items() if each.calls}


def messages_sent(stages_of: Sequence[Sequence[int]]) -> NDArray:
    """Messages of one micro-batch of every stage that leave each pipeline rank: results to the next rank on the way,
    gradients to the one before.
    """
    sent = np.zeros(len(stages_of), dtype=np.int64)
    for here, following in chain.from_iterable(map(pairwise, ways(stages_of))):
        sent[[here, following]] += here != following
    return sent


def step_flops(model: ModelSpec, train: TrainConfig, strategy: Strategy, routed_rows: int) -> list[int]:
    """FLOPs that one rank executes for each stage in a step, exactly: full attention square, recompute included.

    Its experts compute `routed_rows` of every micro-batch (`Sizes.computed`).
    """
    inner = strategy.context_parallel * strategy.tensor_parallel
    microbatches = strategy.stage_microbatches(train.global_batch_size)
    tokens = train.seq_len * strategy.micro_batch_size // inner
    ranges = split_layers(model.num_layers, strategy.num_stages, strategy.layer_split)
    return [
        microbatches
        * int(
            stage_flops(
                model,
                layers,
                is_last=stage == len(ranges) - 1,
                tokens=tokens,
                seq_len=train.seq_len,
                full=int(strategy.recompute == "full"),
                modules=strategy.recompute_modules,
                routed_rows=routed_rows,
            )
        )
        for stage, layers in enumerate(ranges)
    ]

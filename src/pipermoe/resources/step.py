"""The cost of one training step: durations per stage, an admissible lower bound, and the exact StepReport.

`step_costs` prices many strategies at once, `lower_bound` orders them, `report` simulates one of them. All three read
the same arrays, so one strategy costs the same alone as among a million. Arrays are (rows, stages) unless said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.communication import (
    all_to_all_calls,
    all_to_all_seconds,
    message_bytes,
    send_seconds,
    sync_seconds,
    traffic,
)
from pipermoe.resources.compute import stage_flops, stage_seconds
from pipermoe.resources.memory import stage_memory
from pipermoe.resources.rates import pass_seconds
from pipermoe.resources.stages import StageShapes, stage_shapes
from pipermoe.resources.states import state_elements
from pipermoe.schedule.action import Kind
from pipermoe.schedule.builders import build
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.shared_host import simulate_shared_host
from pipermoe.schedule.timeline import Timeline
from pipermoe.specs.mesh import coordinates, split_layers
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.platform import Platform
from pipermoe.specs.report import MEMORY_CATEGORIES, MemoryCategory, RankReport, StepReport, Term, Traffic
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import RECOMPUTE_NAMES, StrategyTable
from pipermoe.specs.train import TrainConfig

# The measured pass "gradient_norm" takes the norm of gradients, scales and zeroes them: each goes over them once.
NORM_SHARE = 1 / 3


@dataclass(frozen=True, slots=True)
class StepCosts:
    """What each rank of a stage spends. Compute seconds are those of a rank alone on its device.

    `forward`, `backward`, `forward_exchange`, `backward_exchange` (all-to-alls) are per micro-batch; `send` is one
    message to the next stage. After the pipeline come `reduce` (gradients), `norm` (compute), `flags` (the world-wide
    reduction of the norm, which every rank waits for), `update` (compute) and `gather` (ZeRO-1 weights).
    """

    forward: NDArray
    backward: NDArray
    forward_exchange: NDArray
    backward_exchange: NDArray
    send: NDArray  # (rows, stages - 1), one column at least
    reduce: NDArray
    norm: NDArray
    flags: NDArray  # (rows, 1)
    update: NDArray
    gather: NDArray


def uniform_groups(table: StrategyTable) -> Iterator[tuple[NDArray, StrategyTable]]:
    """The rows of `table` by pipeline depth and layer split: (row indices, their table)."""
    key = table.num_stages * len(table.splits) + table.layer_split
    for value in np.unique(key):
        rows = np.flatnonzero(key == value)
        yield rows, table.take(rows)


def shapes_of(model: ModelSpec, table: StrategyTable) -> StageShapes:
    """The stages that all rows of a uniform table share."""
    return stage_shapes(model, int(table.num_stages[0]), table.splits[int(table.layer_split[0])])


def is_full(table: StrategyTable) -> NDArray:
    return (table.recompute == RECOMPUTE_NAMES.index("full")).astype(np.int64)


def step_costs(model: ModelSpec, platform: Platform, train: TrainConfig, table: StrategyTable) -> StepCosts:
    """The durations of every row of a uniform table (one pipeline depth, one layer split)."""
    shapes, device, precision = shapes_of(model, table), platform.device, train.precision
    forward, backward = stage_seconds(
        model,
        device,
        precision,
        shapes,
        table.micro_batch_size * train.seq_len,
        train.seq_len,
        model.moe.num_experts // table.expert_parallel,
        is_full(table),
    )
    exchange = all_to_all_calls(model, train, shapes, table)
    forward_exchange, backward_exchange = all_to_all_seconds(platform, exchange, table)
    states = state_elements(model, shapes, table)
    reduce, flags, gather = sync_seconds(platform, train, table, states)
    return StepCosts(
        forward=forward,
        backward=backward,
        forward_exchange=forward_exchange,
        backward_exchange=backward_exchange,
        send=send_seconds(platform, table, message_bytes(model, train, table)),
        reduce=reduce,
        norm=NORM_SHARE * pass_seconds(device, precision, "gradient_norm", states.owned)[0],
        flags=flags,
        update=pass_seconds(device, precision, "optimizer", states.updated)[0]
        + (1 - NORM_SHARE) * pass_seconds(device, precision, "gradient_norm", states.held)[0],
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


def lower_bound(platform: Platform, train: TrainConfig, table: StrategyTable, costs: StepCosts) -> NDArray:
    """Seconds (rows,) that no simulation of the row can undercut, whatever the order of its schedule.

    A stage starts when the first micro-batch has come through the stages before it, works through all micro-batches,
    and its last gradient still has to reach the stages before it (Narayanan et al. 2021, arXiv 2104.04473, section 2.2,
    for equal stages). Ranks that share cores cannot compute faster together than the cores. Nothing passes the
    world-wide reduction of the gradient norm.
    """
    microbatches = table.microbatches(train.global_batch_size)[:, None]
    slots = np.array([compute_slots(platform, int(world)) for world in table.world_size])
    stages = costs.forward.shape[1]
    send = costs.send[:, : stages - 1]
    forward = costs.forward + costs.forward_exchange
    backward = costs.backward + costs.backward_exchange
    fill = np.cumsum(forward, axis=1) - forward
    drain = np.cumsum(backward, axis=1) - backward
    fill[:, 1:] += np.cumsum(send, axis=1)
    drain[:, 1:] += np.cumsum(send, axis=1)
    through = fill + microbatches * (forward + backward) + drain  # the end of stage 0 because of stage s
    latest = np.maximum.accumulate(through[:, ::-1], axis=1)[:, ::-1]
    pipeline = (latest - drain + costs.reduce + costs.norm).max(axis=1)
    pipeline_work = (microbatches * (costs.forward + costs.backward) + costs.norm).sum(axis=1) * table.ranks_per_stage
    update_work = costs.update.sum(axis=1) * table.ranks_per_stage
    reduced = np.maximum(pipeline, pipeline_work / slots)
    updated = np.maximum((costs.update + costs.gather).max(axis=1), update_work / slots)
    return reduced + costs.flags[:, 0] + updated


def step_seconds_by_term(
    platform: Platform, train: TrainConfig, strategy: Strategy, costs: StepCosts
) -> tuple[float, list[dict[Term, float]]]:
    """The simulated step of a single row of costs: its seconds, and for every stage the seconds by term."""
    microbatches = train.global_batch_size // (strategy.data_parallel * strategy.micro_batch_size)
    schedule = build(strategy.schedule, strategy.pipeline_parallel, microbatches, strategy.virtual_stages)
    cost = {field.name: getattr(costs, field.name)[0].tolist() for field in fields(StepCosts)}
    slots = compute_slots(platform, strategy.world_size)
    durations = Durations(
        forward=cost["forward"],
        backward=cost["backward"],
        forward_exchange=cost["forward_exchange"],
        backward_exchange=cost["backward_exchange"],
        transfer=_per_sending_stage(cost["send"], strategy.num_stages),
    )
    timeline = simulate_shared_host(schedule, durations, slots, strategy.ranks_per_stage)
    return _after_pipeline(timeline, cost, slots, strategy.ranks_per_stage)


def _per_sending_stage(boundaries: list[float], stages: int) -> list[float]:
    """Seconds of a message that a stage sends to either neighbour: the slower of the two links."""
    links = boundaries[: stages - 1]
    return [max(links[max(0, s - 1) : s + 1], default=0.0) for s in range(stages)]


def _after_pipeline(
    timeline: Timeline, cost: dict[str, list[float]], slots: float, ranks_per_stage: int
) -> tuple[float, list[dict[Term, float]]]:
    """The end of the step: reduce, agree on the norm, update, gather; and everything by term, per stage."""
    stages = range(timeline.schedule.num_ranks)
    crowding = max(1.0, len(stages) * ranks_per_stage / slots)
    ends = [max(timeline.end[s]) for s in stages]
    norms = [cost["norm"][s] * crowding for s in stages]
    agreed = max(ends[s] + cost["reduce"][s] + norms[s] for s in stages) + cost["flags"][0]
    updates = shared_seconds(cost["update"], ranks_per_stage, slots)
    done = [agreed + updates[s] + cost["gather"][s] for s in stages]
    step = max(done)
    terms = []
    for s in stages:
        forward, backward, exchange = _computed(timeline, s, cost)
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


def _computed(timeline: Timeline, rank: int, cost: dict[str, list[float]]) -> tuple[float, float, float]:
    """Seconds of forward and backward actions of a pipeline rank less their all-to-alls, and those all-to-alls."""
    spent = {Kind.FORWARD: 0.0, Kind.BACKWARD: 0.0}
    exchanged = dict(spent)
    for action, start, end in zip(timeline.schedule.ranks[rank], timeline.start[rank], timeline.end[rank], strict=True):
        name = "forward_exchange" if action.kind is Kind.FORWARD else "backward_exchange"
        exchanged[action.kind] += cost[name][action.stage]
        spent[action.kind] += end - start
    forward, backward = (spent[kind] - exchanged[kind] for kind in (Kind.FORWARD, Kind.BACKWARD))
    return forward, backward, sum(exchanged.values())


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


def predict(model: ModelSpec, platform: Platform, train: TrainConfig, strategy: Strategy) -> StepReport:
    """What one step of `strategy` costs, rank by rank."""
    table = StrategyTable.of([strategy])
    return report(model, platform, train, strategy, step_costs(model, platform, train, table))


def report(
    model: ModelSpec, platform: Platform, train: TrainConfig, strategy: Strategy, costs: StepCosts
) -> StepReport:
    """The report of a strategy whose costs (one row) are known."""
    table = StrategyTable.of([strategy])
    shapes = shapes_of(model, table)
    states = state_elements(model, shapes, table)
    step, terms = step_seconds_by_term(platform, train, strategy, costs)
    memory = stage_memory(model, train, shapes, table, states)
    calls = traffic(model, train, shapes, table, states)
    flops = step_flops(model, train, strategy)
    ranks = []
    for rank in range(strategy.world_size):
        stage = coordinates(strategy, rank).pp
        held: dict[MemoryCategory, int] = {name: int(memory[name][0, stage]) for name in MEMORY_CATEGORIES}
        sent = {key: Traffic(calls=int(c.calls[0, stage]), bytes=int(c.bytes[0, stage])) for key, c in calls.items()}
        ranks.append(
            RankReport(
                rank=rank,
                peak_bytes=sum(held.values()),
                memory_bytes=held,
                flops=flops[stage],
                traffic={key: traffic for key, traffic in sent.items() if traffic.calls},
                seconds=terms[stage],
            )
        )
    return StepReport(step_seconds=step, ranks=tuple(ranks))


def step_flops(model: ModelSpec, train: TrainConfig, strategy: Strategy) -> list[int]:
    """FLOPs that one rank of each stage executes in a step, exactly: full attention square, recompute included."""
    tokens = train.seq_len * train.global_batch_size // strategy.data_parallel
    ranges = split_layers(model.num_layers, strategy.num_stages, strategy.layer_split)
    full = int(strategy.recompute == "full")
    return [
        int(
            stage_flops(
                model, layers, has_head=stage == len(ranges) - 1, tokens=tokens, seq_len=train.seq_len, full=full
            )
        )
        for stage, layers in enumerate(ranges)
    ]

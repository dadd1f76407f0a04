"""The dry run: one rank of a job of any size, executed in this process without memory or network.

It is the program that `pipermoe train` runs (runtime/step.py), on fake tensors, which have shapes and storage sizes but
no numbers, and with torch's fake process group, whose collectives return at once. What it counts is therefore what a
real run under the same routing counts, to the byte and the FLOP.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipermoe.dryrun.attribution import AttributedFlops, AttributedTraffic
from pipermoe.dryrun.planned_routing import planned_counts
from pipermoe.dryrun.shapes import ShapeMode
from pipermoe.layout.policies import POLICIES
from pipermoe.layout.policy import Nodes
from pipermoe.runtime.counters import Counters, MemoryCounter, counted_report
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.layout.lay_out import laid_out_in_order
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.runtime.step import AFTER_PIPELINE, training_step
from pipermoe.runtime.support import check_supported
from pipermoe.schedule.action import Action
from pipermoe.schedule.builders import schedule_of
from pipermoe.schedule.communication import with_communication
from pipermoe.specs.errors import UserError
from pipermoe.specs.footprint import ActionFootprint, Footprint, Routing
from pipermoe.specs.legality import violations
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.report import RankReport
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig


def dry_run(
    model: ModelSpec,
    train: TrainConfig,
    strategy: Strategy,
    *,
    rank: int,
    world_size: int | None = None,
    routing: str = "balanced",
    seed: int = 0,
) -> Footprint:
    """What `rank` uses in one step, exactly. `routing` is read by dryrun/planned_routing.py, drawn by `seed`.

    Raises `UserError` for a model or strategy that the runtime does not execute, a rank outside of the world, a
    `world_size` that is not the strategy's, and counts that do not fit. Runs while no process group exists.
    """
    _check(model, train, strategy, rank, strategy.world_size if world_size is None else world_size)
    tokens = strategy.micro_batch_size * train.seq_len
    counts_PE = planned_counts(
        routing,
        tokens=tokens,
        top_k=model.moe.top_k,
        experts=model.moe.num_experts,
        sources=strategy.expert_parallel,
        seed=seed,
    )
    schedule = with_communication(schedule_of(strategy, train.global_batch_size))
    with fake_world(rank, strategy.world_size), ShapeMode() as shapes:
        groups = ProcessGroups.create(strategy)
        laid_out = laid_out_in_order(model, train, Nodes(strategy.expert_parallel, strategy.expert_parallel))
        engine = Engine(model, train, strategy, schedule, groups, planned_counts=counts_PE.tolist(), laid_out=laid_out)
        optimizer = Optimizer(engine.flats, train.optimizer)
        move_to_planned_layout(engine, optimizer, counts_PE.sum(0))
        report, memory, flops, traffic = _counted_step(rank, engine, optimizer, shapes)
    actions = tuple(
        _footprint_of(action, memory, flops, traffic) for action in (*engine.training.parts, *AFTER_PIPELINE)
    )
    stages = schedule.stages_of(groups.coordinates.pp)
    return Footprint(
        model=model.name,
        train=train,
        strategy=strategy,
        microbatches=schedule.microbatches,
        stages=stages,
        layers=tuple(int(layer) for stage in stages for layer in engine.stages[stage].model.layers),
        routing=_routing(f"{routing}, seed {seed}" if ":" in routing else routing, counts_PE, groups.coordinates.ep),
        report=report,
        peak_action=_footprint_of(memory.action_at_peak, memory, flops, traffic),
        flops_by_module=dict(sorted(flops.by_module.items())),
        actions=actions,
    )


def move_to_planned_layout(engine: Engine, optimizer: Optimizer, load_E: NDArray) -> None:
    """Move experts to where the job's policy wants them for this load of every layer, if the job says so. Collective
    over the expert-parallel group.
    """
    balance, placement = engine.train.balance, engine.placement
    if placement is not None and balance.moves:
        load_LE = np.tile(load_E, (placement.layout.shape[0], 1))
        planned = POLICIES[balance.policy].plan(placement.layout, load_LE, placement.nodes)
        optimizer.adopt(placement.adopt(planned))
        optimizer.gather_weights()


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """This process as `rank` of `world_size` ranks, of which the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _check(model: ModelSpec, train: TrainConfig, strategy: Strategy, rank: int, world_size: int) -> None:
    if broken := violations(strategy, model, train, world_size):
        raise UserError("\n".join(broken))
    check_supported(model, train, strategy)
    if not 0 <= rank < world_size:
        raise UserError(f"--rank = {rank}: must be between 0 and {world_size - 1}, the job has {world_size} ranks")


def _counted_step(
    rank: int, engine: Engine, optimizer: Optimizer, shapes: ShapeMode
) -> tuple[RankReport, MemoryCounter, AttributedFlops, AttributedTraffic]:
    """One step under the counters. The first step is like all others: gradients and moments exist from the start."""
    batch = torch.zeros(
        (engine.microbatches, engine.strategy.micro_batch_size, engine.train.seq_len + 1), dtype=torch.int64
    )
    memory = MemoryCounter(engine.meter, optimizer.tensors())
    flops, traffic = AttributedFlops(engine.meter, optimizer.flats), AttributedTraffic(engine.meter)

    def agree(totals: Tensor) -> float:
        return 0.0  # fake tensors hold no numbers; clipping works in place and costs nothing that is counted

    with shapes.counted(Counters(memory, flops, traffic)):
        training_step(engine, optimizer, batch, agree, engine.train.optimizer.learning_rate)
    return counted_report(rank, memory, flops, traffic), memory, flops, traffic


def _footprint_of(
    action: Action | str, memory: MemoryCounter, flops: AttributedFlops, traffic: AttributedTraffic
) -> ActionFootprint:
    placed = isinstance(action, Action)
    return ActionFootprint(
        action=str(action),
        kind=str(action.kind) if placed else action,
        stage=action.stage if placed else None,
        microbatch=action.microbatch if placed else None,
        flops=flops.by_action.get(action, 0),
        peak_bytes=memory.peak_by_action.get(action, 0),
        traffic=traffic.of(action),
    )


def _routing(description: str, counts_PE: NDArray, ep: int) -> Routing:
    """The rows that reach each rank of the expert-parallel group, of which this one is rank `ep`."""
    ranks = counts_PE.shape[0]
    received = counts_PE.sum(0).reshape(ranks, -1).sum(1)
    return Routing(
        description=description,
        rows=int(received[ep]),
        mean_rows=float(received.mean()),
        busiest_rank=int(received.argmax()),
        busiest_rows=int(received.max()),
    )

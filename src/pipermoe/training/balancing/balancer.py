"""The balancer of a run: watches how experts are loaded, looks for a better layout, and moves to it where that pays.

Rank 0 plans and judges, in a thread beside the next steps and from numbers summed over all ranks; what it decides all
ranks are told between an update and the weights' way back, so none can mean another layout than the others.
"""

# L MoE layers, N ranks of an expert-parallel group, S slots of a rank, E logical experts, W steps that are remembered

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.policies import POLICIES
from pipermoe.layout.trigger import Trigger, gain_rows, gain_that_stays, horizon_steps, pays
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.specs.train import Balance
from pipermoe.training.balancing.balance_line import BalanceLine
from pipermoe.training.balancing.moving_costs import MovingCosts
from pipermoe.training.balancing.planning import Planning

REMEMBERED = 5  # steps whose mean load is the forecast (Hecate's window)


class Balancer:
    """Of one rank; every rank makes one and calls the same."""

    def __init__(self, config: Balance, engine: Engine, optimizer: Optimizer) -> None:
        assert engine.placement is not None
        self._config, self._engine, self._optimizer = config, engine, optimizer
        self._placement = engine.placement
        self._policy, self._trigger = POLICIES[config.policy], Trigger(config.every_steps, config.threshold)
        self._loads_W: deque[NDArray[np.int64]] = deque(maxlen=REMEMBERED)
        self._planning: Planning | None = None
        self._costs = MovingCosts(config.mechanism, engine)
        self._moved, self._move_seconds = 0, 0.0
        self._planning_seconds: float | None = None
        self._kept = self._abandoned = 0

    def resume(self, saved: ExpertLayout | None) -> None:
        """Begin with the layout of a checkpoint that is loaded next, if it has as many ranks and slots. Collective."""
        if saved is not None and saved.shape == self._placement.layout.shape:
            self._optimizer.adopt(self._placement.adopt(saved))

    def observe(self, step: int, load_LE: NDArray[np.int64], compute_seconds: float, line: BalanceLine) -> BalanceLine:
        """Take in the load of all ranks in `step`, which counts from 1, and look for a layout if it is time to.

        The result is `line` with what has moved.
        """
        self._loads_W.append(load_LE)
        layout = self._placement.layout
        first = self._engine.groups.rank == 0
        if first and self._planning is None and self._trigger.fires(step, line.rank_load, spilled=line.spilled > 0):
            search = partial(self._better, layout, list(self._loads_W), compute_seconds)
            self._planning = Planning(search, self._config.timeout_seconds)
        line = replace(
            line,
            version=layout.version,
            moved=self._moved,
            move_seconds=self._move_seconds,
            planning_seconds=self._planning_seconds,
            kept=self._kept,
            abandoned=self._abandoned,
        )
        self._moved, self._move_seconds = 0, 0.0
        return line

    def move(self) -> None:
        """Move to the layout that was found and pays, if there is one. Collective over the world.

        To be called after an update, before weights are gathered.
        """
        start = time.perf_counter()
        layout = self._told(self._decide() if self._engine.groups.rank == 0 else None)
        if layout is None:
            return
        had_LNE = self._placement.layout.copies_LNE
        self._optimizer.adopt(self._placement.adopt(layout))
        self._moved = int(((self._placement.layout.copies_LNE > 0) & (had_LNE == 0)).sum())
        self._move_seconds = time.perf_counter() - start

    def _decide(self) -> ExpertLayout | None:
        """The layout to move to, on rank 0."""
        planning, before = self._planning, self._placement.layout
        if planning is None:
            return None
        if planning.late:
            self._planning, self._abandoned = None, self._abandoned + 1
            return None
        after = planning.result()
        if after is None:
            return None
        self._planning, self._planning_seconds = None, planning.seconds
        if after is before:
            self._kept += 1
            return None
        return after

    def _better(self, before: ExpertLayout, loads: list[NDArray[np.int64]], compute_seconds: float) -> ExpertLayout:
        """What the policy plans for the mean of `loads`, where it pays; else `before`."""
        forecast_LE = np.rint(np.mean(loads, axis=0)).astype(np.int64)
        after = self._policy.plan(before, forecast_LE, self._placement.nodes)
        if after is before or after.same_as(before):
            return before
        costs = self._costs
        lasting = costs.seconds_per_step(after, compute_seconds) - costs.seconds_per_step(before, compute_seconds)
        gain = gain_rows(before, after, forecast_LE) * costs.seconds_per_row(compute_seconds, int(loads[-1].sum()))
        earns = pays(
            gain_seconds_per_step=gain - lasting,
            horizon_steps=horizon_steps(loads, 1),
            stays=gain_that_stays(before, after, [*loads, forecast_LE]),
            move_seconds=costs.move_seconds(before, after),
        )
        return after if earns else before

    def _told(self, decided: ExpertLayout | None) -> ExpertLayout | None:
        """What rank 0 has decided, on every rank."""
        engine, layout = self._engine, self._placement.layout
        version = torch.tensor([decided.version if decided else 0], device=engine.device)
        dist.broadcast(version, 0, group=engine.groups.world)
        if not version.item():
            return None
        slots = torch.from_numpy((decided or layout).slots_LNS.copy()).to(engine.device)
        dist.broadcast(slots, 0, group=engine.groups.world)
        return ExpertLayout(slots.cpu().numpy(), layout.num_experts, int(version))

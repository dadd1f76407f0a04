"""Start a plan's ranks on this machine, or join those that torchrun or srun started."""

from __future__ import annotations

import os
import shutil
from datetime import timedelta
from pathlib import Path

from pipermoe.runtime.world import World, existing_world
from pipermoe.specs.errors import UserError
from pipermoe.specs.legality import violations
from pipermoe.specs.plan import Measurement, Plan

TIMEOUT_SECONDS = 180.0  # of one collective: a rank that is silent for longer counts as stalled


def launch(
    plan: Plan,
    output: Path,
    *,
    steps: int | None = None,
    resume: bool = False,
    weights: Path | None = None,
    quiet: bool = False,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Measurement | None:
    """Train `plan` and return what was measured (None on ranks but 0 of a world that others started).

    `steps` stops there instead of after the plan's steps; the learning rate follows the plan all the same, so that a
    run stopped early and resumed equals one that was not. `resume` goes on from the newest checkpoint in `output`.
    `weights` is a folder of published weights (config.json and safetensors) to start from; the trained ones are then
    written the same way, into `output`/weights.
    `quiet` keeps stdout free. Raises `UserError` for wrong input and `MachineError` when a rank fails, dies or stalls;
    then every other rank has been stopped, and nothing half-written is left.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo prints a C++ stack for every closed connection
    from pipermoe.runtime.checkpoint import check_resumable, checkpoints, find_newest, partial_folder
    from pipermoe.runtime.data.batches import load_text
    from pipermoe.runtime.hf_weights import check_weights
    from pipermoe.runtime.local_ranks import run_local_ranks
    from pipermoe.runtime.rank import device_for, run_rank
    from pipermoe.runtime.support import check_supported
    from pipermoe.runtime.trainer import MEASUREMENT_FILE, Run
    from pipermoe.specs.documents import load

    world = existing_world(os.environ)
    _check_world(plan, world)
    if steps is not None and steps < 1:
        raise UserError(f"steps = {steps}: must be at least 1")
    if broken := violations(plan.strategy, plan.model, plan.train, plan.strategy.world_size):
        raise UserError("\n".join(f"plan {plan.name}: {line}" for line in broken))
    check_supported(plan.model, plan.train, plan.strategy)
    newest = find_newest(output) if resume else None
    if newest is not None:
        check_resumable(newest, plan)
    elif world is None and checkpoints(output):
        raise UserError(f"{output}: holds checkpoints of another run; add --resume or choose another --output")
    if weights is not None:
        check_weights(weights, plan.model)
    _make_folder(output)
    if world is None or world.rank == 0:
        for stale in (output / MEASUREMENT_FILE, *output.glob("rank-*.error.txt")):
            stale.unlink(missing_ok=True)  # should this run fail, nobody shall take the last one's results for its own
    data = load_text(plan.train, plan.model.vocab_size)
    run = Run(output, steps, newest, weights, quiet, timedelta(seconds=timeout_seconds))

    if world is not None:
        return run_rank(plan, data, run, world)
    device_for(plan.strategy.world_size)  # refuses more ranks than devices before any process starts
    shutil.rmtree(partial_folder(output), ignore_errors=True)
    try:
        run_local_ranks(
            plan.strategy.world_size, lambda local: run_rank(plan, data, run, local), output, timeout_seconds
        )
    finally:
        shutil.rmtree(partial_folder(output), ignore_errors=True)
    return load(output / MEASUREMENT_FILE, Measurement)


def _check_world(plan: Plan, world: World | None) -> None:
    if world is not None and world.size != plan.strategy.world_size:
        raise UserError(
            f"{world.starter} started {world.size} ranks, the plan is for {plan.strategy.world_size} "
            f"({plan.strategy.compact()}); start {plan.strategy.world_size} or plan for {world.size}"
        )


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made a folder: {error.strerror}") from None
    if not os.access(output, os.W_OK):
        raise UserError(f"{output}: cannot be written to; choose another --output")

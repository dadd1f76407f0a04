"""Start a plan's ranks on this machine, or join those that torchrun or srun started."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pipermoe.processes.output_folder import lock_folder
from pipermoe.processes.world import World, existing_world
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.plan import Measurement, Plan

if TYPE_CHECKING:
    from pipermoe.data.batches import TextData
    from pipermoe.training.run import Run


def launch(
    plan: Plan, run: Run, *, resume: bool = False, nproc: int | None = None, where: str = "the plan"
) -> Measurement | None:
    """Train `plan` and return what was measured (None on ranks but 0 of a world that others started).

    `run.steps` stops there instead of after the plan's steps; the learning rate follows the plan all the same, so that
    a run stopped early and resumed equals one that was not. `resume` goes on from the newest checkpoint in
    `run.output`, or begins where there is none yet. `nproc` is how many ranks to start here, which must be the plan's.
    `where` names the plan in errors. Raises `UserError` for wrong input and `MachineError` when a rank fails, dies or
    stalls; then every other rank has been stopped, and nothing half-written is left.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo prints a C++ stack for every closed connection
    from pipermoe.processes.progress import Display

    world = existing_world(os.environ)
    _check_world(plan, world, nproc, where)
    _check_plan(plan, run, where)
    from pipermoe.training.checkpoint.store import check_same_text, partial_folder  # torch: not for a wrong plan

    run = _with_start(plan, run, resume)
    speaks = world is None or world.rank == 0
    if resume and run.resume is None and speaks:
        print(f"{run.output}: holds no checkpoint yet; training begins with the first step", file=sys.stderr)
    with lock_folder(run.output) if speaks else nullcontext():
        if speaks:
            _remove_stale(run.output)
        with Display(shown=speaks).activity("reading the text"):
            data = _load_text(plan)
        if run.resume is not None:
            check_same_text(run.resume, data.fingerprint, data.source)
        if world is not None:
            return _run_in(world, plan, data, run)
        shutil.rmtree(partial_folder(run.output), ignore_errors=True)
        try:
            return _run_here(plan, data, run)
        finally:
            shutil.rmtree(partial_folder(run.output), ignore_errors=True)


def _run_in(world: World, plan: Plan, data: TextData, run: Run) -> Measurement | None:
    """As one of the ranks that others have started."""
    from pipermoe.processes.interrupt import end_on_signals
    from pipermoe.training.rank import run_rank
    from pipermoe.training.roll_call import RollCall

    roll_call = RollCall(world, run.output, run.timeout)
    end_on_signals(say=world.rank == 0, last_words=roll_call.last_words)
    try:
        return run_rank(plan, data, replace(run, tell=roll_call.tell), world, roll_call)
    except UserError as error:
        raise roll_call.verdict(error) from error


def _run_here(plan: Plan, data: TextData, run: Run) -> Measurement:
    from pipermoe.processes.local_ranks import run_local_ranks
    from pipermoe.processes.status_board import StatusBoard
    from pipermoe.specs.documents import load
    from pipermoe.training.rank import device_for, run_rank
    from pipermoe.training.trainer import MEASUREMENT_FILE

    ranks = plan.strategy.world_size
    device_for(ranks)  # refuses more ranks than devices before any process starts
    board = StatusBoard(ranks)
    run_local_ranks(
        ranks,
        lambda world: run_rank(plan, data, replace(run, tell=board.writer(world.rank)), world),
        run.output,
        run.timeout / timedelta(seconds=1),
        doing=board.read,
    )
    return load(run.output / MEASUREMENT_FILE, Measurement)


def _check_world(plan: Plan, world: World | None, nproc: int | None, where: str) -> None:
    wanted, compact = plan.strategy.world_size, plan.strategy.compact()
    if world is not None and world.size != wanted:
        raise UserError(
            f"{world.starter} started {world.size} ranks, {where} is for {wanted} ({compact}); "
            f"start {wanted} or plan for {world.size}"
        )
    if nproc is not None and world is not None:
        raise UserError(f"--nproc = {nproc}: {world.starter} has started the ranks already; leave it out")
    if nproc is not None and nproc != wanted:
        raise UserError(f"--nproc = {nproc}: {where} is for {wanted} ranks ({compact}); plan with --ranks {nproc}")


def _check_plan(plan: Plan, run: Run, where: str) -> None:
    """Everything about the plan that can be known to be wrong before a rank starts."""
    from pipermoe.runtime.support import check_supported
    from pipermoe.training.tensorboard import require_tensorboard

    if run.steps is not None and run.steps < 1:
        raise UserError(f"--steps = {run.steps}: must be at least 1")
    last = run.steps or plan.train.steps
    if outside := [step for step in run.trace_steps if not 1 <= step <= last]:
        raise UserError(f"--trace-steps: {outside[0]} is not a step of this run; they are 1 to {last}")
    try:
        check_supported(plan.model, plan.train, plan.strategy)
    except UserError as error:
        raise UserError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from None
    if run.tensorboard is not None:
        require_tensorboard()
    if run.weights is not None:
        if plan.train.balance.policy != "static":
            rule = "published weights are read in the order of experts; use static"
            raise UserError(describe_value(where, "train.balance.policy", plan.train.balance.policy, rule))
        from pipermoe.modules.hf.weights import check_weights

        check_weights(run.weights, plan.model)


def _with_start(plan: Plan, run: Run, resume: bool) -> Run:
    """The run with the checkpoint it begins from. UserError for one of another job, and where one would be lost.

    `resume` without a checkpoint begins anew: a job that is started again and again, as by a batch system, may be
    stopped before its first.
    """
    from pipermoe.training.checkpoint.store import check_resumable, checkpoints

    found = checkpoints(run.output)
    if resume and found:
        check_resumable(found[-1], plan)
        return replace(run, resume=found[-1])
    if found:
        raise UserError(f"{run.output}: holds checkpoints of another run; add --resume or choose another --output")
    return run


def _remove_stale(output: Path) -> None:
    """Should this run fail, nobody shall take the last one's results for its own."""
    from pipermoe.training.trainer import MEASUREMENT_FILE, TRACE_FILE

    for stale in (output / MEASUREMENT_FILE, output / TRACE_FILE, *output.glob("rank-*.error.txt")):
        stale.unlink(missing_ok=True)


def _load_text(plan: Plan) -> TextData:
    from pipermoe.data.batches import load_text

    return load_text(plan.train, plan.model.vocab_size)

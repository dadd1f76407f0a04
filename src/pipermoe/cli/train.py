"""`pipermoe train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipermoe.cli.options import Output, Switch, step_numbers
from pipermoe.specs.train import Mechanism

if TYPE_CHECKING:
    from pipermoe.specs.plan import Plan

LONGEST_TIMEOUT = 86400.0  # seconds


def train(
    *,
    plan: Path,
    output: Output = Path("run"),
    steps: int | None = None,
    resume: Switch = False,
    weights: Path | None = None,
    balance: str | None = None,
    mechanism: Mechanism | None = None,
    spare_slots: int | None = None,
    spill_above: float | None = None,
    nproc: int | None = None,
    timeout: float = 180.0,
    trace_steps: str | None = None,
    tensorboard: Path | None = None,
    json: Switch = False,
) -> None:
    """Train with exactly the strategy of a plan, and measure what the plan predicted.

    Starts the plan's ranks on this machine, or joins those that torchrun or srun started.

    Parameters
    ----------
    plan
        The plan file (see `pipermoe plan`).
    output
        Folder for the log, the measurement and checkpoints.
    steps
        Stop after this many steps; the learning rate goes on as if all of the plan's were to come.
    resume
        Go on from the newest checkpoint in the output folder; without one yet, begin.
    weights
        Start from the published weights in this folder (config.json and safetensors files of a Hugging Face model), and
        write the trained ones the same way, into the output folder.
    balance
        Move experts to where the load is by this policy (see `pipermoe balance --help`), instead of what the plan says.
    mechanism
        How they move: bound (with their optimizer state), decoupled (that stays spread over all ranks) or sparse
        (copies live while a layer computes).
    spare_slots
        Slots of every rank for copies, beyond its even share of the experts.
    spill_above
        After the router of a layer: what a rank has beyond so many times the mean rows (1.1), others compute with
        copies for this one micro-batch. Goes with and without --balance.
    nproc
        Ranks to start on this machine; default and only choice: the plan's. Not with torchrun or srun.
    timeout
        Seconds after which a rank that does not answer counts as stalled, and the run ends.
    trace_steps
        Write these steps as a Chrome trace, output/trace.json: 10,11.
    tensorboard
        Write the numbers of every step into this folder for TensorBoard too.
    json
        Print the measurement as JSON.
    """
    from datetime import timedelta

    from pipermoe.specs.documents import load, to_json
    from pipermoe.specs.errors import UserError
    from pipermoe.specs.plan import Plan
    from pipermoe.training.launch import launch
    from pipermoe.training.run import Run

    if not 0 < timeout <= LONGEST_TIMEOUT:
        raise UserError(f"--timeout = {timeout:g}: must be positive, and at most a day")
    run = Run(
        output,
        steps=steps,
        weights=weights,
        quiet=json,
        timeout=timedelta(seconds=timeout),
        trace_steps=step_numbers(trace_steps),
        tensorboard=tensorboard,
    )
    options = {"mechanism": mechanism, "spare_slots": spare_slots, "spill_above": spill_above}
    chosen = _balanced(load(plan, Plan), policy=balance, **options)
    measurement = launch(chosen, run, resume=resume, nproc=nproc, where=str(plan))
    if measurement is not None and json:
        print(to_json(measurement))


def _balanced(plan: Plan, **options: str | float | None) -> Plan:
    """The plan with these options of the command line instead of what it says of its balance."""
    from pipermoe.layout.policies import POLICIES
    from pipermoe.specs.documents import validate
    from pipermoe.specs.errors import UserError
    from pipermoe.specs.train import Balance

    given = {key: value for key, value in options.items() if value is not None}
    if given.get("policy", "static") not in POLICIES:
        raise UserError(f"--balance = {given['policy']!r}: must be one of {', '.join(POLICIES)}")
    balance = validate({**plan.train.balance.model_dump(), **given}, Balance, where="command line")
    return plan.model_copy(update={"train": plan.train.model_copy(update={"balance": balance})})

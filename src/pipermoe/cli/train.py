"""`pipermoe train`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pipermoe.cli.options import Output, Switch, step_numbers
from pipermoe.specs.errors import UserError
from pipermoe.specs.train import Mechanism

if TYPE_CHECKING:
    from pipermoe.specs.plan import Plan

LONGEST_TIMEOUT = 86400.0  # seconds


def _in_time(_: object, seconds: float) -> None:
    if not 0 < seconds <= LONGEST_TIMEOUT:
        raise UserError(f"--timeout = {seconds:g}: must be positive, and at most a day")


Timeout = Annotated[
    float,
    Parameter(
        validator=_in_time, help="Seconds after which a rank that does not answer counts as stalled, and the run ends."
    ),
]


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceOptions:
    """Where experts go, instead of what the plan says."""

    policy: Annotated[
        str | None,
        Parameter(
            name="--balance",
            help="Move experts to where the load is by this policy (see `pipermoe balance --help`), instead of what "
            "the plan says.",
        ),
    ] = None
    mechanism: Annotated[
        Mechanism | None,
        Parameter(
            help="How they move: bound (with their optimizer state), decoupled (that stays spread over all ranks) or "
            "sparse (copies live while a layer computes)."
        ),
    ] = None
    spare_slots: Annotated[
        int | None, Parameter(help="Slots of every rank for copies, beyond its even share of the experts.")
    ] = None
    spill_above: Annotated[
        float | None,
        Parameter(
            help="After the router of a layer: what a rank has beyond so many times the mean rows (1.1), others "
            "compute with copies for this one micro-batch. Goes with and without --balance."
        ),
    ] = None

    def instead(self, plan: Plan) -> Plan:
        """The plan with what is given here. Raises `UserError`."""
        from pipermoe.layout.policies import POLICIES
        from pipermoe.specs.documents import validate
        from pipermoe.specs.train import Balance

        if self.policy not in (None, *POLICIES):
            raise UserError(f"--balance = {self.policy!r}: must be one of {', '.join(POLICIES)}")
        given = {key: value for key, value in asdict(self).items() if value is not None}
        balance = validate({**plan.train.balance.model_dump(), **given}, Balance, where="command line")
        return plan.model_copy(update={"train": plan.train.model_copy(update={"balance": balance})})


AS_PLANNED = BalanceOptions()


def train(
    *,
    plan: Path,
    output: Output = Path("run"),
    steps: int | None = None,
    resume: Switch = False,
    weights: Path | None = None,
    balance: BalanceOptions = AS_PLANNED,
    nproc: int | None = None,
    timeout: Timeout = 180.0,
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
        Stop after this many steps; the learning rate goes on as if all of the plan's were to come. To resume later,
        the plan needs train.checkpoint_every.
    resume
        Go on from the newest checkpoint in the output folder; without one yet, begin.
    weights
        Start from the published weights in this folder (config.json and safetensors files of a Hugging Face model), and
        write the trained ones the same way, into the output folder.
    nproc
        Ranks to start on this machine; default and only choice: the plan's. Not with torchrun or srun.
    trace_steps
        Write these steps as a Chrome trace, output/trace.json: 10,11.
    tensorboard
        Write the numbers of every step into this folder for TensorBoard too.
    json
        Print the measurement as JSON.
    """
    from pipermoe.specs.documents import load, to_json
    from pipermoe.specs.plan import Plan
    from pipermoe.training.launch import launch
    from pipermoe.training.run import Run

    run = Run(
        output,
        steps=steps,
        weights=weights,
        quiet=json,
        timeout=timedelta(seconds=timeout),
        trace_steps=step_numbers(trace_steps),
        tensorboard=tensorboard,
    )
    chosen = balance.instead(load(plan, Plan))
    measurement = launch(chosen, run, resume=resume, nproc=nproc, where=str(plan))
    if measurement is not None and json:
        print(to_json(measurement))

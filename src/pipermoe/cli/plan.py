"""`pipermoe plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Unpack

from cyclopts import Parameter

from pipermoe import __version__
from pipermoe.cli.options import (
    NO_JOB,
    NO_LIMITS,
    JobOptions,
    LimitOptions,
    ModelName,
    Output,
    PlatformName,
    Plot,
    Runtime,
    Switch,
    duration,
    number_of_ranks,
)
from pipermoe.cli.output import note, show
from pipermoe.specs.errors import UserError

if TYPE_CHECKING:
    from pipermoe.planner.campaign import Goal
    from pipermoe.planner.job import Job, Limits
    from pipermoe.planner.result import PlanningResult
    from pipermoe.specs.model import ModelSpec
    from pipermoe.specs.platform import Platform
    from pipermoe.specs.train import TrainConfig


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The whole run that a plan is for."""

    tokens: Annotated[
        str | None,
        Parameter(
            help="Tokens of the whole run, such as 15T: its days and device-hours with failures and checkpoints."
        ),
    ] = None
    target: Annotated[
        str | None, Parameter(help='The fewest ranks that reach it, such as "100B tokens in 3 days".')
    ] = None
    price: Annotated[
        float | None, Parameter(help="Of one device-hour, to give the run's cost in the same currency.")
    ] = None
    mtbf: Annotated[
        str | None,
        Parameter(
            help="Mean time between failures of one device, such as 50000h. "
            "Default: 419 failures in 54 days of 16,384 H100."
        ),
    ] = None

    def goal(self) -> Goal | None:
        """What the options describe, None if nothing. Raises `UserError`."""
        from pipermoe.planner.campaign import Goal, parse_target, parse_tokens
        from pipermoe.resources.goodput import Reliability

        if self.target is None and self.tokens is None:
            if self.price is not None or self.mtbf is not None:
                raise UserError("--price and --mtbf say what a whole run costs: give its --tokens, such as 15T")
            return None
        if self.target is not None and self.tokens is not None:
            raise UserError("--target names the tokens: leave --tokens out")
        if self.target is not None:
            count, seconds = parse_target(self.target)
        else:
            count, seconds = parse_tokens(self.tokens or ""), None
        reliability = Reliability() if self.mtbf is None else Reliability(duration("--mtbf", self.mtbf))
        return Goal(tokens=count, seconds=seconds, price=self.price, reliability=reliability)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What is searched for, and how far."""

    objective: Annotated[
        Literal["step-time", "memory", "device-hours"],
        Parameter(
            help="The fastest step; the most memory to spare among strategies at most 5 % slower; or, of all numbers "
            "of ranks up to --ranks, the one that trains --tokens in the fewest device-hours."
        ),
    ] = "step-time"
    runtime: Runtime = "pipermoe"
    within: Annotated[
        float,
        Parameter(help="By how many per cent another strategy may be faster, which takes less to prove; 0 is none."),
    ] = 0.0
    top: Annotated[int, Parameter(help="Rows in the table.")] = 8


WHOLE_RUN, FASTEST = RunOptions(), SearchOptions()


def plan(
    model: ModelName,
    *,
    platform: PlatformName,
    ranks: Annotated[int | None, Parameter(name=["--ranks", "--gpus"])] = None,
    nodes: int | None = None,
    job: JobOptions = NO_JOB,
    limits: LimitOptions = NO_LIMITS,
    search: SearchOptions = FASTEST,
    run: RunOptions = WHOLE_RUN,
    pareto: Switch = False,
    plot: Plot | None = None,
    output: Output = Path("plan.toml"),
    json: Switch = False,
) -> None:
    """Find the fastest strategy that fits, and say why it won.

    Parameters
    ----------
    ranks
        Number of ranks. Default: the ranks of one of the platform's hosts.
    nodes
        Number of hosts instead, all of their ranks.
    pareto
        Also the front of step time against memory.
    plot
        Draw that front into this file (.svg or .png).
    output
        The plan file to write (TOML): what `pipermoe train` runs.
    json
        Print the ranking and the explanation as JSON.
    """
    from pipermoe.report.campaign import front_picture
    from pipermoe.report.picture import write_picture
    from pipermoe.report.plan import render_planning
    from pipermoe.specs.catalogue import load_model
    from pipermoe.specs.documents import require_writable, save
    from pipermoe.specs.platform_file import load_platform

    require_writable(output)
    machine, spec = load_platform(platform), load_model(model)
    task, case, goal = job.train(machine), limits.limits(), run.goal()
    if run.target is not None and (ranks is not None or nodes is not None):
        raise UserError("--target finds the number of ranks: leave --ranks and --nodes out")
    asked = number_of_ranks(machine, ranks, nodes)
    planning = _find(spec, machine, task, asked, search, goal, pareto=pareto or plot is not None, **case)
    save(output, planning.plan, header=f"A plan by pipermoe {__version__}: {planning.plan.strategy.compact()}")
    show(planning, lambda console: render_planning(planning, console), as_json=json)
    note(f"Wrote {output}", as_json=json)
    if plot is not None:
        write_picture(front_picture(planning.pareto, planning.plan.name), plot)
        note(f"Wrote {plot}", as_json=json)
    if not json:
        runs_on = sorted(planning.plan.runs_on, key=lambda name: name != search.runtime)  # what was asked for first
        note(_next_commands(output, runs_on, planning.chosen.worst_rank), as_json=json)


def _find(
    model: ModelSpec,
    platform: Platform,
    train: TrainConfig,
    ranks: int,
    search: SearchOptions,
    goal: Goal | None,
    *,
    pareto: bool,
    **limits: Unpack[Limits],
) -> PlanningResult:
    """The plan for so many ranks, or for as many as the goal asks for."""
    from pipermoe.planner import find_plan
    from pipermoe.planner.job import Job
    from pipermoe.specs.runtimes import executed_by

    job = Job.of(model, platform, train, ranks, executed_by(search.runtime, model, train), **limits)
    return find_plan(
        model,
        platform,
        train,
        world_size=_size(job, search.objective, goal),
        objective="memory" if search.objective == "memory" else "step-time",
        goal=goal,
        pareto=pareto,
        runtime=search.runtime,
        within=search.within / 100,
        top=search.top,
        **limits,
    )


def _size(job: Job, objective: str, goal: Goal | None) -> int:
    """The number of ranks: the job's, or what the goal asks for."""
    from pipermoe.planner.campaign import fewest_device_hours, fewest_ranks

    if goal is not None and goal.seconds is not None:
        return fewest_ranks(job, goal)
    if objective != "device-hours":
        return job.world_size
    if goal is None:
        raise UserError("--objective device-hours: of how many tokens? give --tokens, such as 15T")
    return fewest_device_hours(job, goal)


def _next_commands(plan: Path, runs_on: Sequence[str], worst_rank: int) -> str:
    """What a plan is for, with what can execute it."""
    commands = {}
    if "pipermoe" in runs_on:
        commands[f"train --plan {plan}"] = "run it"
        commands[f"dryrun --plan {plan} --rank {worst_rank}"] = "the worst rank's exact bytes and FLOPs"
    first, *others = [name for name in (*runs_on, "slurm") if name != "pipermoe"]
    if runs_on:
        commands[f"export {first} --plan {plan}"] = f"or {', '.join(others)}" if others else "a batch script"
    width = max(map(len, commands), default=0)
    return "\n".join(f"  pipermoe {command:<{width}}  # {what}" for command, what in commands.items())

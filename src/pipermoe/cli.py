"""The command line. Thin: each command parses, calls one function and prints its result.

Results go to stdout, progress to stderr. Exit codes: 0 done, 2 wrong input, 3 no plan fits, 4 the machine failed,
130 interrupted. Imports are lazy, so that `--help` is quick and planning never loads torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from pipermoe import __version__
from pipermoe.specs.errors import UserError

app = App(
    name="pipermoe",
    version=__version__,
    help="Find, predict and run the best way to train a Mixture-of-Experts language model.",
    help_on_error=False,
)

Output = Parameter(name=["--output", "-o"])
Switch = Parameter(negative="")
Json = Annotated[bool, Switch]
WIDTH = 100


@app.command(sort_key=0)
def measure(
    *,
    nproc: int = 4,
    output: Annotated[Path, Output] = Path("machine.toml"),
    model: str | None = None,
    memory: str | None = None,
    quick: Annotated[bool, Switch] = False,
    json: Json = False,
) -> None:
    """Measure what this machine can do and write it as a platform file.

    Parameters
    ----------
    nproc
        Ranks on this machine.
    output
        The platform file to write (TOML).
    model
        Measure at this model's sizes: a catalogue name or a file.
    memory
        Memory budget of one rank, for example 96MiB. Without it: this machine's memory divided by the ranks.
    quick
        Fewer sizes and repeats, about a quarter of the time.
    json
        Print the platform as JSON.
    """
    from pipermoe.measure import measure_platform
    from pipermoe.report.platform import render_platform
    from pipermoe.specs.catalogue import load_model
    from pipermoe.specs.documents import require_writable, save
    from pipermoe.specs.units import parse_bytes

    require_writable(output)
    budget = _quantity("--memory", memory, parse_bytes)
    spec = load_model(model) if model else None
    platform = measure_platform(nproc=nproc, model=spec, memory_bytes=budget, quick=quick)
    save(
        output,
        platform,
        header=f"Measured by pipermoe {__version__}. Edit freely; every number has its evidence below.",
    )
    _show(platform, json, lambda console: render_platform(platform, console))
    _note(f"Wrote {output}", json)


@app.command(sort_key=1)
def describe(
    model: str,
    *,
    seq_len: int = 4096,
    assume: str | None = None,
    json: Json = False,
) -> None:
    """Count a model exactly: parameters, active parameters, FLOPs per token, per component and layer.

    Parameters
    ----------
    model
        A catalogue name, a model file (TOML), a Hugging Face config.json or its folder.
    seq_len
        Sequence length for attention FLOPs and activation sizes.
    assume
        Read a config.json of unknown model_type as this family.
    json
        Print as JSON.
    """
    from pipermoe.report.describe import render_description
    from pipermoe.resources.describe import describe_model
    from pipermoe.specs.catalogue import load_model

    description = describe_model(load_model(model, assume=assume), seq_len=seq_len)
    _show(description, json, lambda console: render_description(description, console))


@app.command(sort_key=2)
def plan(
    model: str,
    *,
    platform: Path,
    job: Path | None = None,
    ranks: Annotated[int | None, Parameter(name=["--ranks", "--gpus"])] = None,
    seq_len: int | None = None,
    global_batch: int | None = None,
    memory: str | None = None,
    top: int = 8,
    output: Annotated[Path, Output] = Path("plan.toml"),
    json: Json = False,
) -> None:
    """Find the fastest strategy that fits, and say why it won.

    Parameters
    ----------
    model
        A catalogue name, a model file (TOML), a Hugging Face config.json or its folder.
    platform
        The platform file (see `pipermoe measure`).
    job
        The training job (TOML): batch, sequence, optimizer, data. Options below override it.
    ranks
        Number of ranks. Default: the ranks of the platform's host.
    seq_len
        Tokens in a sequence.
    global_batch
        Sequences in a step.
    memory
        Memory budget of one rank, for example 80GiB. Default: the platform's.
    top
        Rows in the ranked table.
    output
        The plan file to write (TOML): what `pipermoe train` runs.
    json
        Print the ranking and the explanation as JSON.
    """
    from pipermoe.planner import find_plan
    from pipermoe.report.plan import render_planning
    from pipermoe.specs.catalogue import load_model
    from pipermoe.specs.documents import load, require_writable, save
    from pipermoe.specs.platform import Platform
    from pipermoe.specs.units import parse_bytes

    require_writable(output)
    machine = load(platform, Platform)
    planning = find_plan(
        load_model(model),
        machine,
        _job(job, seq_len, global_batch),
        world_size=ranks or machine.host.ranks,
        memory_budget_bytes=_quantity("--memory", memory, parse_bytes),
        top=top,
    )
    save(output, planning.plan, header=f"A plan by pipermoe {__version__}: {planning.plan.strategy.compact()}")
    _show(planning, json, lambda console: render_planning(planning, console))
    _note(f"Wrote {output}", json)


@app.command(sort_key=2.5)
def dryrun(
    *,
    rank: int,
    plan: Path | None = None,
    model: str | None = None,
    strategy: str | None = None,
    world_size: Annotated[int | None, Parameter(name=["--world-size", "--ranks", "--gpus"])] = None,
    job: Path | None = None,
    seq_len: int | None = None,
    global_batch: int | None = None,
    routing: str = "balanced",
    seed: int = 0,
    json: Json = False,
) -> None:
    """Execute one rank of a job of any size without memory or network: exact bytes, FLOPs and traffic.

    Parameters
    ----------
    rank
        Which rank of the job.
    plan
        The plan file (see `pipermoe plan`); or give --model and --strategy.
    model
        A catalogue name, a model file (TOML), a Hugging Face config.json or its folder.
    strategy
        A strategy file (TOML), or a line such as "pp8 dp32 ep32 mbs1 1f1b z1".
    world_size
        Ranks of the job, to check the strategy against.
    job
        The training job (TOML). Without it: bf16, and what the next two options say.
    seq_len
        Tokens in a sequence. Default: 4096.
    global_batch
        Sequences in a step. Default: two micro-batches for every pipeline stage.
    routing
        Rows by expert: balanced, lognormal:max=1.5, lognormal:sigma=0.5, or a JSON file of counts or shares.
    seed
        Draws the log-normal loads.
    json
        Print as JSON, action by action.
    """
    from pipermoe.report.footprint import render_footprint
    from pipermoe.specs.catalogue import load_model, looks_like_a_path
    from pipermoe.specs.documents import load
    from pipermoe.specs.plan import Plan
    from pipermoe.specs.strategy import Strategy

    if plan is not None:
        if model or strategy or job or seq_len or global_batch:
            raise UserError("--plan brings model, strategy and job; leave their options out")
        document = load(plan, Plan)
        spec, arrangement, task = document.model, document.strategy, document.train
    elif model and strategy:
        spec = load_model(model)
        arrangement = load(strategy, Strategy) if looks_like_a_path(strategy) else Strategy.parse(strategy)
        batch = 2 * arrangement.num_stages * arrangement.data_parallel * arrangement.micro_batch_size
        defaults = {} if job else {"seq_len": 4096, "global_batch_size": batch, "precision": "bf16"}
        task = _job(job, seq_len, global_batch, defaults)
    else:
        raise UserError("give --plan, or --model and --strategy")

    from pipermoe.runtime.dryrun import dry_run

    footprint = dry_run(spec, task, arrangement, rank=rank, world_size=world_size, routing=routing, seed=seed)
    _show(footprint, json, lambda console: render_footprint(footprint, console))


@app.command(sort_key=3)
def train(
    *,
    plan: Path,
    output: Annotated[Path, Output] = Path("run"),
    steps: int | None = None,
    resume: Annotated[bool, Switch] = False,
    weights: Path | None = None,
    json: Json = False,
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
        Train this many steps instead of the plan's.
    resume
        Go on from the newest checkpoint in the output folder.
    weights
        Start from the published weights in this folder (config.json and safetensors files of a Hugging Face model), and
        write the trained ones the same way, into the output folder.
    json
        Print the measurement as JSON.
    """
    from pipermoe.runtime.launch import launch
    from pipermoe.specs.documents import load
    from pipermoe.specs.plan import Plan

    measurement = launch(load(plan, Plan), output, steps=steps, resume=resume, weights=weights, quiet=json)
    if measurement is not None and json:
        print(measurement.model_dump_json(indent=2, exclude_none=True))


@app.command(sort_key=4)
def compare(
    *,
    plan: Path,
    run: Path,
    json: Json = False,
) -> None:
    """Lay a plan's prediction beside the measurement of its run: predicted, measured, error.

    Parameters
    ----------
    plan
        The plan file.
    run
        The output folder of `pipermoe train`, or its measurement.json.
    json
        Print as JSON.
    """
    from pipermoe.report.comparison import compare as lay_side_by_side
    from pipermoe.report.comparison import render
    from pipermoe.specs.documents import load
    from pipermoe.specs.plan import Measurement, Plan

    measurement = load(run / "measurement.json" if run.is_dir() else run, Measurement)
    comparison = lay_side_by_side(load(plan, Plan), measurement)
    _show(comparison, json, lambda console: render(comparison, console))


@app.command(sort_key=5)
def schedule(
    name: str,
    *,
    pp: int = 4,
    microbatches: int = 8,
    vpp: int | None = None,
    plot: Path | None = None,
    csv: Path | None = None,
    trace: Path | None = None,
    json: Json = False,
) -> None:
    """Print a pipeline schedule as papers do; draw it, export it for torch, trace it.

    Parameters
    ----------
    name
        1f1b, gpipe, interleaved-1f1b, zb-h1, zb-v, dualpipe, ...; or a CSV file of torch.distributed.pipelining.
    pp
        Pipeline ranks.
    microbatches
        Micro-batches of one step.
    vpp
        Model chunks per rank. Default: the fewest that the schedule takes.
    plot
        Draw it into this file (SVG or PNG).
    csv
        Write it in the format of torch.distributed.pipelining.
    trace
        Write a Chrome trace (open in ui.perfetto.dev).
    json
        Print the actions, the bubble and the activations in flight as JSON.
    """
    from pipermoe.report.schedule import draw, render_table, summary, write_trace
    from pipermoe.schedule.builders import build_or_read
    from pipermoe.schedule.timeline import simulate
    from pipermoe.schedule.torch_csv import write_csv

    built = build_or_read(name, pp, microbatches, vpp)
    timeline = simulate(built)
    for path, write in (
        (csv, lambda path: write_csv(built, path)),
        (plot, lambda path: draw(timeline, path)),
        (trace, lambda path: write_trace(timeline, path)),
    ):
        if path is not None:
            write(path)
            _note(f"Wrote {path}", json)
    if json:
        print(summary(timeline).model_dump_json(indent=2))
    else:
        print(render_table(built, width=_console().width))


@app.command(sort_key=6)
def demo(*, output: Annotated[Path, Output] = Path("demo"), json: Json = False) -> None:
    """Walk the whole loop on this machine without a GPU: measure, plan, train on 4 ranks, compare.

    Parameters
    ----------
    output
        Folder for all files that the loop writes.
    json
        Print the comparison as JSON.
    """
    from pipermoe.demo import run_demo

    code = run_demo(output, as_json=json)
    if code:
        sys.exit(code)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; every expected failure is one line on stderr and an exit code."""
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except CycloptsError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return _fail("this command needs torch: pip install 'pipermoe[train]'", 2)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return 0


def _fail(message: str, code: int) -> int:
    for line in message.splitlines():
        print(f"pipermoe: {line}", file=sys.stderr)
    return code


def _show(result: Any, as_json: bool, render: Any) -> None:
    """The result on stdout, as JSON or for people."""
    if as_json:
        print(result.model_dump_json(indent=2, exclude_none=True))
    else:
        render(_console())


def _console() -> Console:
    """The terminal, or 100 columns where there is none, so that a table in a file is whole."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)


def _note(message: str, as_json: bool) -> None:
    """A remark for people; on stderr when stdout carries JSON."""
    Console(stderr=as_json).print(message, highlight=False)


def _quantity(option: str, text: str | None, parse: Any) -> Any:
    if text is None:
        return None
    try:
        value = parse(text) if not text.isdigit() else int(text)
    except ValueError as error:
        raise UserError(f"{option} = {text!r}: {error}") from None
    if value <= 0:
        raise UserError(f"{option} = {text!r}: must be positive")
    return value


def _job(
    path: Path | None, seq_len: int | None, global_batch: int | None, defaults: dict[str, Any] | None = None
) -> Any:
    """The job file with the command line's values on top; UserError when nothing gives a needed one."""
    from pipermoe.specs.documents import read_mapping, validate
    from pipermoe.specs.train import TrainConfig

    data = read_mapping(path) if path else dict(defaults or {})
    given = {"seq_len": seq_len, "global_batch_size": global_batch}
    data |= {key: value for key, value in given.items() if value is not None}
    options = {"seq_len": "--seq-len", "global_batch_size": "--global-batch"}
    missing = [option for key, option in options.items() if key not in data]
    if missing and path is None:
        raise UserError(f"{' and '.join(missing)} must be given, or a --job file that holds them")
    return validate(data, TrainConfig, where=str(path or "command line"))

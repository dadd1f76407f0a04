"""Predicted against measured step time: strategies of the demo's model on ranks of this machine.

python -m benchmarks.step_time [--platform machine.toml] [--steps 12] [--passes 1] [--only WORD] [--json FILE]

Measures this machine (or reads a platform that `pipermoe measure` wrote), then trains every strategy for a few steps,
all of them once per pass, and prints both times, the error by strategy, its median, and the rank correlation; where the
machine is a virtual one, also what share of its cores' time its host took while it trained. Nothing is fitted to these
runs. About 5 minutes a pass on two cores.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.command_line import parser_of, write_json
from benchmarks.demo_machine import MODEL, RANKS, ThisMachine, demo_job, demo_options
from pipermoe.resources.step import predict
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.documents import load
from pipermoe.specs.plan import Plan
from pipermoe.specs.platform import Platform
from pipermoe.specs.report import TERMS, StepReport
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.units import GIB, format_seconds
from pipermoe.training.launch import launch
from pipermoe.training.run import Run
from pipermoe.validate.accuracy import spearman

STEAL = 7  # the place of stolen time among the states of a core (proc(5))

STRATEGIES = (
    "pp1 dp4 ep1 edp4 mbs4 1f1b z0",
    "pp1 dp4 ep4 mbs4 1f1b z0",
    "pp1 dp4 ep4 mbs1 1f1b z1",
    "pp1 dp4 ep2 edp2 mbs2 1f1b z1",
    "pp1 dp4 ep4 mbs4 1f1b z1 full",
    "pp2 dp2 ep2 mbs1 1f1b z0",
    "pp2 dp2 ep2 mbs2 1f1b z1",
    "pp2 dp2 ep2 mbs4 1f1b z1",
    "pp2 dp2 ep2 mbs2 gpipe z1",
    "pp2 dp2 ep1 edp2 mbs2 1f1b z1",
    "pp2 dp2 ep2 mbs2 1f1b z1 full",
    "pp4 dp1 ep1 mbs1 1f1b z0",
    "pp4 dp1 ep1 mbs4 1f1b z0",
    "pp4 dp1 ep1 mbs2 gpipe z0 full",
)


class Trained(NamedTuple):
    """What a run of a plan measured, and what share of the cores' time the host of a virtual machine kept from it."""

    report: StepReport
    stolen: float


def trained(plan: Plan, steps: int) -> Trained:
    before = processor_ticks()
    with tempfile.TemporaryDirectory(prefix="pipermoe-steps-") as folder:
        measurement = launch(plan, Run(Path(folder), steps=steps, quiet=True))
    assert measurement is not None, "this process starts the ranks, so it has the result"
    ticks = [now - then for now, then in zip(processor_ticks(), before, strict=True)]
    return Trained(measurement.report, ticks[STEAL] / sum(ticks))


def all_trained(plans: list[Plan], steps: int, passes: int) -> dict[str, list[Trained]]:
    """Every pass of every plan, until interrupted; every second pass goes backwards, so that drift cancels."""
    found: dict[str, list[Trained]] = defaultdict(list)
    with suppress(KeyboardInterrupt):
        for number in range(passes):
            for plan in plans if number % 2 == 0 else reversed(plans):
                found[plan.name].append(trained(plan, steps))
    return found


def plan_of(platform: Platform, strategy: str) -> Plan:
    """The demo's job by a strategy."""
    model, train, parsed = load_model(MODEL), demo_job(), Strategy.parse(strategy)
    return Plan(
        name=strategy,
        platform=platform.name,
        memory_budget_bytes=GIB,
        model=model,
        train=train,
        strategy=parsed,
        prediction=predict(model, platform, train, parsed),
    )


def processor_ticks() -> list[int]:
    """What all cores together have spent in each state since the machine started (proc(5), /proc/stat)."""
    first, *_ = Path("/proc/stat").read_text().splitlines()
    return [int(ticks) for ticks in first.split()[1 : 2 + STEAL]]


def row_of(plan: Plan, measured: list[Trained]) -> dict:
    predicted, seconds = plan.prediction, [each.report.step_seconds for each in measured]
    return {
        "strategy": plan.name,
        "predicted_seconds": predicted.step_seconds,
        "measured_seconds": fmean(seconds),
        "spread": max(seconds) / min(seconds) - 1,
        "stolen": fmean(each.stolen for each in measured),
        "error": predicted.step_seconds / fmean(seconds) - 1,
        "terms": {
            term: (predicted.mean_seconds(term), fmean(each.report.mean_seconds(term) for each in measured))
            for term in TERMS
        },
    }


def summary_of(rows: list[dict]) -> dict:
    errors = [abs(row["error"]) for row in rows]
    times = [[row[key] for row in rows] for key in ("predicted_seconds", "measured_seconds")]
    return {
        "strategies": len(rows),
        "median_absolute_error": median(errors),
        "worst_absolute_error": max(errors),
        "spearman": spearman(*times),
    }


def print_rows(rows: list[dict], summary: dict) -> None:
    table = Table(title=f"Step time of {MODEL} on {RANKS} ranks", title_justify="left")
    for name in ("strategy", "predicted", "measured", "error", "spread", "stolen"):
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row["measured_seconds"]):
        times = (format_seconds(row[key]) for key in ("predicted_seconds", "measured_seconds"))
        table.add_row(row["strategy"], *times, f"{row['error']:+.1%}", f"{row['spread']:.1%}", f"{row['stolen']:.1%}")
    console = Console(width=100)
    console.print(table)
    console.print(
        f"{summary['strategies']} strategies: median absolute error {summary['median_absolute_error']:.1%} (worst "
        f"{summary['worst_absolute_error']:.1%}), Spearman {summary['spearman']:.3f}",
        highlight=False,
    )


def main() -> None:
    parser = parser_of(__doc__)
    demo_options(parser, steps=12, passes=1)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    platform = load(options.platform, Platform) if options.platform else ThisMachine().measure(load_model(MODEL))
    plans = [plan_of(platform, text) for text in STRATEGIES if options.only in text]
    measured = all_trained(plans, options.steps, options.passes)
    rows = [row_of(plan, measured[plan.name]) for plan in plans if plan.name in measured]
    if not rows:
        parser.exit(1, "interrupted before a strategy was trained\n")
    summary = summary_of(rows)
    print_rows(rows, summary)
    write_json(options, {"summary": summary, "rows": rows})


if __name__ == "__main__":
    main()

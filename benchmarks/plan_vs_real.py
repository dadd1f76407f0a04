"""The planner's choice beside the truly fastest: strategies of the demo's model that fit, trained on this machine.

python -m benchmarks.plan_vs_real [--platform machine.toml] [--memory 130MiB] [--steps 8] [--passes 1] [--most 12]
                                  [--slow-link MBIT] [--json FILE]

Measures this machine (or reads what `pipermoe measure` wrote), plans the demo's job on 4 ranks, trains strategies that
fit the budget less the usual headroom, each once per pass in an order that alternates, and prints how much slower the
planner's choice is than the fastest and how many places the ranking is off. Trained are 12, or `--most N`, or with a
large N all: the best half, and the others evenly from the rest of the ranking. `--slow-link 200` puts two ranks each on
two hosts (network namespaces) with a link of 200 Mbit/s, measures that machine and trains there. Times count only on a
machine that does nothing else; a pass of a strategy takes about 15 s on two cores. Interrupted, it tells what it has.
"""

from __future__ import annotations

from contextlib import nullcontext
from statistics import fmean, mean

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import parser_of, write_json
from benchmarks.demo_machine import MODEL, RANKS, Demo, ThisMachine, demo_options, slow_link
from pipermoe.cli.options import memory_bytes
from pipermoe.planner.find import searched
from pipermoe.specs.legality import legal_mask
from pipermoe.specs.plan import Plan
from pipermoe.specs.report import StepReport
from pipermoe.specs.runtimes.own import EXECUTABLE
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import format_seconds
from pipermoe.validate.accuracy import spearman

BUDGET = "130MiB"  # the demo's
LIMIT = 10_000


def feasible(demo: Demo, budget: int, most: int) -> list[Plan]:
    """The plans that fit and that this runtime runs, as the planner ranks them: all, or the best and some others."""
    field = searched(demo.model, demo.platform, demo.train, RANKS, memory_budget_bytes=budget)
    strategies = [field.space.strategy(found.place) for found in field.best(LIMIT).best]
    runs = legal_mask(StrategyTable.of(strategies), demo.model, demo.train, RANKS, EXECUTABLE)
    ranked = [strategy for strategy, can in zip(strategies, runs, strict=True) if can]
    return [demo.plan(strategy_text(ranked[place])) for place in _chosen(len(ranked), most)]


def _chosen(ranked: int, most: int) -> list[int]:
    """Up to `most` places of `ranked`."""
    best = min(ranked, most // 2 if ranked > most else ranked)
    others = np.linspace(best, ranked - 1, min(most, ranked) - best).round().astype(int)
    return [*range(best), *others.tolist()]


def rows_of(plans: list[Plan], measured: dict[str, list[StepReport]]) -> list[dict]:
    """A row for every plan, fastest measured first, with both places."""
    seconds = {name: [report.step_seconds for report in reports] for name, reports in measured.items()}
    rows = [
        {
            "strategy": plan.name,
            "planned_place": place,
            "predicted_seconds": plan.prediction.step_seconds,
            "measured_seconds": fmean(seconds[plan.name]),
            "spread": max(seconds[plan.name]) / min(seconds[plan.name]) - 1,
        }
        for place, plan in enumerate(plans, start=1)
        if plan.name in measured
    ]
    rows.sort(key=lambda row: row["measured_seconds"])
    return [row | {"measured_place": place} for place, row in enumerate(rows, start=1)]


def summary_of(rows: list[dict]) -> dict:
    chosen = next(row for row in rows if row["planned_place"] == 1)
    return {
        "strategies": len(rows),
        "choice": chosen["strategy"],
        "choice_slower_than_fastest": chosen["measured_seconds"] / rows[0]["measured_seconds"] - 1,
        "choice_measured_place": chosen["measured_place"],
        "mean_places_off": mean(abs(row["planned_place"] - row["measured_place"]) for row in rows),
        "spearman": spearman(*([row[key] for row in rows] for key in ("predicted_seconds", "measured_seconds"))),
    }


def print_rows(rows: list[dict], summary: dict) -> None:
    table = Table(title=f"{MODEL} on {RANKS} ranks, fastest first", title_justify="left", box=None, pad_edge=False)
    for name in ("#", "planned", "strategy", "measured", "predicted", "spread"):
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=name != "strategy")
    for row in rows:
        times = (format_seconds(row[key]) for key in ("measured_seconds", "predicted_seconds"))
        places = str(row["measured_place"]), str(row["planned_place"])
        table.add_row(*places, row["strategy"], *times, f"{row['spread']:.1%}")
    console = Console(width=100)
    console.print(table, highlight=False)
    console.print(
        f"The planner's choice is {summary['choice_slower_than_fastest']:.1%} slower than the fastest of "
        f"{summary['strategies']} (place {summary['choice_measured_place']}); places are off by "
        f"{summary['mean_places_off']:.1f} on average, rank correlation {summary['spearman']:.3f}",
        highlight=False,
    )


def main() -> None:
    parser = parser_of(__doc__)
    demo_options(parser, steps=8)
    parser.add_argument("--memory", default=BUDGET)
    parser.add_argument("--most", type=int, default=12)
    parser.add_argument("--slow-link", type=float, metavar="MBIT")
    options = parser.parse_args()
    with slow_link(options.slow_link) if options.slow_link else nullcontext(ThisMachine()) as machine:
        demo = Demo.on(machine, options.platform)
        plans = feasible(demo, memory_bytes(options.memory) or demo.platform.memory_budget_bytes, options.most)
        rows = rows_of(plans, demo.measured(plans, options.steps, options.passes))
    summary = summary_of(rows)
    print_rows(rows, summary)
    write_json(options, {"summary": summary, "rows": rows})


if __name__ == "__main__":
    main()

"""The planner's choice beside the truly fastest: every strategy of the demo's model that fits, trained on this machine.

python -m benchmarks.plan_vs_real [--platform machine.toml] [--memory 130MiB] [--steps 8] [--passes 1] [--most N]
                                  [--json FILE]

Measures this machine (or reads what `pipermoe measure` wrote), plans the demo's job on 4 ranks, trains the strategies
that fit the budget, all once per pass in an order that alternates, and prints how much slower the planner's choice is
than the fastest and how many places the ranking is off. `--most N` takes the N best and no more. Times count only on a
machine that does nothing else; a pass of a strategy takes about 15 s on two cores.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from statistics import fmean, mean

from rich.console import Console
from rich.table import Table

from benchmarks.step_time import MODEL, RANKS, plan_of, run
from pipermoe.cli.options import memory_bytes
from pipermoe.measure import measure_platform
from pipermoe.planner.find import searched
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.documents import load
from pipermoe.specs.legality import EXECUTABLE, legal_mask
from pipermoe.specs.plan import Plan
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.train import TrainConfig
from pipermoe.specs.units import format_seconds
from pipermoe.validate.accuracy import spearman

BUDGET = "130MiB"  # the demo's
LIMIT = 10_000


def feasible(platform: Platform, train: TrainConfig, budget: int, most: int) -> list[Plan]:
    """The plans that fit and that this runtime runs, as the planner ranks them."""
    model = load_model(MODEL)
    field = searched(model, platform, train, RANKS, budget)
    strategies = [field.space.strategy(found.place) for found in field.best(LIMIT).best]
    runs = legal_mask(StrategyTable.of(strategies), model, train, RANKS, EXECUTABLE)
    chosen = [strategy for strategy, can in zip(strategies, runs, strict=True) if can]
    return [plan_of(strategy_text(strategy), model, platform, train) for strategy in chosen[:most]]


def measured_seconds(plans: list[Plan], steps: int, passes: int) -> dict[str, list[float]]:
    """Seconds a step of every plan in every pass; every second pass goes backwards, so that drift cancels."""
    seconds: dict[str, list[float]] = {plan.name: [] for plan in plans}
    for number in range(passes):
        for plan in plans if number % 2 == 0 else reversed(plans):
            seconds[plan.name].append(run(plan, steps).step_seconds)
    return seconds


def rows_of(plans: list[Plan], seconds: dict[str, list[float]]) -> list[dict]:
    """A row for every plan, fastest measured first, with both places."""
    rows = [
        {
            "strategy": plan.name,
            "planned_place": place,
            "predicted_seconds": plan.prediction.step_seconds,
            "measured_seconds": fmean(seconds[plan.name]),
            "spread": max(seconds[plan.name]) / min(seconds[plan.name]) - 1,
        }
        for place, plan in enumerate(plans, start=1)
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
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", type=Path)
    parser.add_argument("--memory", default=BUDGET)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--most", type=int, default=LIMIT)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    job = files("pipermoe.catalogue").joinpath("jobs/demo.toml")
    train = load(str(job), TrainConfig).model_copy(update={"validation_batches": 1})
    model = load_model(MODEL)
    platform = load(options.platform, Platform) if options.platform else measure_platform(nproc=RANKS, model=model)
    assert platform is not None, "this process starts the ranks, so it has the result"
    plans = feasible(platform, train, memory_bytes(options.memory) or platform.memory_budget_bytes, options.most)
    rows = rows_of(plans, measured_seconds(plans, options.steps, options.passes))
    summary = summary_of(rows)
    print_rows(rows, summary)
    if options.json:
        options.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

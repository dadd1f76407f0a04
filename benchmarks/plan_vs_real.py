"""The planner's choice beside the truly fastest: strategies of the demo's model that fit, trained on this machine.

python -m benchmarks.plan_vs_real [--seconds 200] [--json FILE] [--batch 8] [--memory 130MiB] [--every 40]
                                  [--slow-link MBIT] [--platform machine.toml] [--steps 1] [--passes 2] [--finals 3]

Measures this machine (or reads what `pipermoe measure` wrote), plans the demo's job with `--batch` sequences a step on
4 ranks, tries strategies that fit the memory less the usual headroom, and prints how much slower the planner's choice
is than the fastest and how many places the ranking is off. Tried are the planner's ten best and, of every kind (the
same arrangement, schedule, micro-batch, and no, some or all recomputation), every 40th in the order of their text:
`--every 1` tries all. A trial builds the runtime and takes one step to warm up and `--steps` that are timed. All are
tried once per pass, in an order that alternates; then the fastest and the choice `--finals` times more, since of many
that are timed a few times the fastest was also the luckiest.

No trial begins later than `--seconds` after the command. FILE keeps the machine, the ranking and every time: the same
command again goes on. `--slow-link 200` puts two ranks each on two hosts (network namespaces) whose link carries
200 Mbit/s, measures that machine and trains there. Times count only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from contextlib import nullcontext
from statistics import mean, median

from rich.console import Console
from rich.table import Table

from benchmarks.command_line import parser_of, write_json
from benchmarks.demo_machine import MODEL, RANKS, Machine, ThisMachine, demo_job, demo_options, slow_link
from benchmarks.demo_trials import Trials
from pipermoe.cli.options import memory_bytes
from pipermoe.planner.find import searched
from pipermoe.specs.base import Frozen
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.documents import load
from pipermoe.specs.platform import Platform
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.train import TrainConfig
from pipermoe.specs.units import format_seconds
from pipermoe.validate.accuracy import spearman

BUDGET = "130MiB"  # the demo's
LIMIT = 100_000  # more than fit
BEST, FINALISTS, SHOWN = 10, 10, 25


class Ranked(Frozen):
    """A strategy that fits, and its place by the planner."""

    strategy: str
    place: int
    predicted_seconds: float


class Contest(Frozen):
    """The strategies to try, of `feasible` that fit, and what each pass over them has timed so far: seconds a step."""

    platform: Platform
    train: TrainConfig
    feasible: int
    ranked: tuple[Ranked, ...]
    timed: dict[str, list[list[float]]]

    def seconds(self, each: Ranked) -> float:
        """Of a step, measured."""
        return median(step for steps in self.timed[each.strategy] for step in steps)

    @property
    def tried(self) -> list[Ranked]:
        """The fastest first."""
        return sorted((each for each in self.ranked if each.strategy in self.timed), key=self.seconds)


def contest(options: argparse.Namespace, machine: Machine) -> Contest:
    """As an earlier run left it, or a new one."""
    if options.json and options.json.exists():
        return load(options.json, Written).contest
    model, train = load_model(MODEL), demo_job().model_copy(update={"global_batch_size": options.batch})
    platform = load(options.platform, Platform) if options.platform else machine.measure(model)
    field = searched(model, platform, train, RANKS, memory_budget_bytes=memory_bytes(options.memory))
    found = [(field.space.strategy(each.place), each.seconds) for each in field.best(LIMIT).best]
    return Contest(
        platform=platform,
        train=train,
        feasible=len(found),
        ranked=_chosen(found, options.every),
        timed={},
    )


def _chosen(found: list[tuple[Strategy, float]], every: int) -> tuple[Ranked, ...]:
    """The best and every so many of each kind, in an order drawn once: a slow minute falls on no kind alone."""
    kinds: dict[tuple, list[Ranked]] = defaultdict(list)
    for place, (strategy, seconds) in enumerate(found, start=1):
        arranged = strategy.pipeline_parallel, strategy.expert_parallel, strategy.rank_order, strategy.virtual_stages
        kind = *arranged, strategy.schedule, strategy.micro_batch_size, strategy.recompute
        kinds[kind].append(Ranked(strategy=strategy_text(strategy), place=place, predicted_seconds=seconds))
    in_order = [sorted(kind, key=lambda each: each.strategy) for kind in kinds.values()]
    best = [each for kind in in_order for each in kind if each.place <= BEST]
    chosen = {each.strategy: each for each in best + [each for kind in in_order for each in kind[::every]]}
    return tuple(random.Random(0).sample([chosen[text] for text in sorted(chosen)], len(chosen)))


def due(now: Contest, passes: int, finals: int) -> list[Ranked]:
    """What is to be tried, one after the other: every second pass goes backwards, so that drift cancels."""

    def missing(ranked: list[Ranked], numbers: range) -> list[Ranked]:
        order = [(number, each) for number in numbers for each in (ranked if number % 2 == 0 else ranked[::-1])]
        return [each for number, each in order if len(now.timed.get(each.strategy, ())) <= number]

    finalists = [each for place, each in enumerate(now.tried) if place < FINALISTS or each.place == 1]
    return missing(list(now.ranked), range(passes)) or missing(finalists, range(passes, passes + finals))


def tried(now: Contest, machine: Machine, options: argparse.Namespace, until: float) -> Contest:
    """With what has been timed until the time was over, or nothing was left to try."""
    while waiting := due(now, options.passes, options.finals):
        trials = Trials(
            model=load_model(MODEL),
            train=now.train,
            strategies=tuple(Strategy.parse(each.strategy) for each in waiting),
            steps=options.steps,
            until=until,
        )
        timed = {text: list(passes) for text, passes in now.timed.items()}
        results = machine.tried(trials)
        for each, seconds in zip(waiting, results, strict=False):
            timed.setdefault(each.strategy, []).append(seconds)
        now = now.model_copy(update={"timed": timed})
        if len(results) < len(waiting):
            break
    return now


def rows_of(now: Contest) -> list[dict]:
    """A row for every strategy that was tried, the fastest first, with both places among them."""
    planned = sorted(now.tried, key=lambda each: each.place)
    return [
        {
            "strategy": each.strategy,
            "measured_place": place,
            "planned_place": planned.index(each) + 1,
            "place_of_all": each.place,
            "predicted_seconds": each.predicted_seconds,
            "measured_seconds": now.seconds(each),
            "passes": len(now.timed[each.strategy]),
            "spread": _spread(now.timed[each.strategy]) if len(now.timed[each.strategy]) > 1 else None,
        }
        for place, each in enumerate(now.tried, start=1)
    ]


def _spread(passes: list[list[float]]) -> float:
    """How much longer the slowest pass took than the fastest."""
    return max(map(median, passes)) / min(map(median, passes)) - 1


def summary_of(rows: list[dict], feasible: int) -> dict:
    choice = min(rows, key=lambda row: row["place_of_all"])
    spreads = [row["spread"] for row in rows if row["spread"] is not None]
    errors = [row["predicted_seconds"] / row["measured_seconds"] - 1 for row in rows]
    return {
        "feasible": feasible,
        "strategies": len(rows),
        "choice": choice["strategy"],
        "choice_slower_than_fastest": choice["measured_seconds"] / rows[0]["measured_seconds"] - 1,
        "choice_measured_place": choice["measured_place"],
        "mean_places_off": mean(abs(row["planned_place"] - row["measured_place"]) for row in rows),
        "spearman": spearman(*([row[key] for row in rows] for key in ("predicted_seconds", "measured_seconds"))),
        "median_error": median(errors),
        "median_absolute_error": median(map(abs, errors)),
        "worst_errors": [min(errors), max(errors)],
        "median_spread_of_passes": median(spreads) if spreads else None,
    }


def print_rows(rows: list[dict], summary: dict) -> None:
    title = f"{MODEL} on {RANKS} ranks, the {SHOWN} fastest and the choice"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("#", "planned", "strategy", "measured", "predicted", "passes", "spread"):
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=name != "strategy")
    for row in rows:
        if row["measured_place"] <= SHOWN or row["strategy"] == summary["choice"]:
            times = (format_seconds(row[key]) for key in ("measured_seconds", "predicted_seconds"))
            places = str(row["measured_place"]), str(row["planned_place"])
            table.add_row(*places, row["strategy"], *times, str(row["passes"]), _share(row["spread"]))
    console = Console(width=110)
    console.print(table, highlight=False)
    low, high = summary["worst_errors"]
    console.print(
        f"The planner's choice is {summary['choice_slower_than_fastest']:.1%} slower than the fastest of "
        f"{summary['strategies']} (place {summary['choice_measured_place']}) of {summary['feasible']:,} that fit; "
        f"places are off by {summary['mean_places_off']:.1f} on average, rank correlation {summary['spearman']:.3f}; "
        f"predictions are {summary['median_error']:+.1%} off in the median ({low:+.0%} to {high:+.0%}), two passes "
        f"differ by {_share(summary['median_spread_of_passes'])}",
        highlight=False,
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


class Written(Frozen):
    """What `--json` holds."""

    summary: dict
    rows: list[dict]
    contest: Contest


def main() -> None:
    parser = parser_of(__doc__)
    demo_options(parser, steps=1, passes=2)
    parser.add_argument("--finals", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--memory", default=BUDGET)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--slow-link", type=float, metavar="MBIT")
    options = parser.parse_args()
    until = time.time() + options.seconds
    with slow_link(options.slow_link) if options.slow_link else nullcontext(ThisMachine()) as machine:
        now = tried(contest(options, machine), machine, options, until)
    rows = rows_of(now)
    summary = summary_of(rows, now.feasible) if rows else {}
    write_json(options, Written(summary=summary, rows=rows, contest=now).model_dump(mode="json"))
    if rows:
        print_rows(rows, summary)
    if waiting := len(due(now, options.passes, options.finals)):
        print(f"{waiting} trials are left: the same command goes on")


if __name__ == "__main__":
    main()

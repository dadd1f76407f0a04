"""Published mappings beside the planner's: is its best at least as good, and how high does the published one rank?

python -m benchmarks.published_mappings [--only WORD] [--most N] [--json FILE]

Every distinct recipe of the shipped rows (`pipermoe validate`) that is complete. Both strategies are predicted by the
same model, under the software profile of the row. The rank is counted over all strategies of the planner's space that
fit, by the lower bound of their step, which every strategy has; the published mapping by its own bound. A row whose
mapping lies outside of what the planner searches (its schedule, split or recomputation) ranks where its bound falls.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pipermoe.planner.candidate import candidate
from pipermoe.planner.search import Field, Job
from pipermoe.report.plan import WORDS
from pipermoe.resources.evaluate import peak_bytes, step_bound
from pipermoe.resources.step import predict
from pipermoe.specs.report import TERMS
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import format_seconds
from pipermoe.validate.recipe import NotCovered, Recipe, recipe_of
from pipermoe.validate.rows import published_rows

HEADS = 4096  # written out at once
TOP = 0.01
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def distinct_recipes() -> dict[str, Recipe]:
    """The complete recipes by the id of the first row that has them."""
    found: dict[tuple, tuple[str, Recipe]] = {}
    for row in published_rows():
        try:
            recipe = recipe_of(row)
        except NotCovered:
            continue
        train = recipe.train
        key = (recipe.model.name, recipe.platform.name, recipe.strategy, train.seq_len, train.global_batch_size)
        found.setdefault((*key, train.precision, recipe.software), (row.id, recipe))
    return dict(found.values())


def rank_of(field: Field, bound: float) -> tuple[int, int]:
    """How many fitting strategies have a lower bound below `bound`, of how many."""
    job, space = field.job, field.space
    below = fitting = 0
    for start in range(0, len(space.heads), HEADS):
        heads = np.arange(start, min(start + HEADS, len(space.heads)))
        table = space.table(space.places(heads, space.select()))
        fits = peak_bytes(job.model, job.train, table, imbalance=job.imbalance) <= job.memory_budget_bytes
        found = step_bound(job.model, job.platform, job.train, table.take(fits), job.imbalance)
        below, fitting = below + int(np.count_nonzero(found < bound)), fitting + len(found)
    return below, fitting


def compare(row_id: str, recipe: Recipe) -> dict:
    """One row of the table."""
    started, strategy = time.process_time(), recipe.strategy
    model, platform, train = recipe.model, recipe.platform, recipe.train
    job = Job(model, platform, train, strategy.world_size, platform.memory_budget_bytes)
    field = Field.of(job)
    published = candidate(job, strategy, predict(model, platform, train, strategy))
    result = {
        "row": row_id,
        "model": model.name,
        "machine": f"{strategy.world_size} {platform.name}",
        "published": strategy_text(strategy),
        "published_seconds": published.step_seconds,
        "published_fits": published.peak_bytes <= job.memory_budget_bytes,
        "measured_seconds": recipe.measured_seconds,
    }
    ranking = field.best()
    if not ranking.best:
        return result | {"best": None}
    chosen = field.space.strategy(ranking.best[0].place)
    best = candidate(job, chosen, predict(model, platform, train, chosen))
    saved = {term: published.seconds[term] - best.seconds[term] for term in TERMS}
    [bound] = step_bound(model, platform, train, StrategyTable.of([strategy]), job.imbalance)
    below, fitting = rank_of(field, float(bound))
    return result | {
        "best": strategy_text(chosen),
        "best_seconds": best.step_seconds,
        "term": max(TERMS, key=saved.__getitem__),
        "below": below,
        "fitting": fitting,
        "cpu_seconds": time.process_time() - started,
    }


def summary_of(rows: list[dict]) -> dict:
    judged = [row for row in rows if row["best"]]
    shares = [row["below"] / row["fitting"] for row in judged] or [0.0]
    return {
        "mappings": len(rows),
        "judged": len(judged),
        "best_at_least_as_good": sum(row["best_seconds"] <= row["published_seconds"] for row in judged),
        "in_top_1_percent": sum(share <= TOP for share in shares[: len(judged)]),
        "rank_quantiles": {f"{q:.0%}": float(np.quantile(shares, q)) for q in QUANTILES},
        "published_does_not_fit_here": sum(not row["published_fits"] for row in rows),
    }


def print_rows(rows: list[dict], summary: dict) -> None:
    table = Table(box=None, pad_edge=False, title="Published mappings and the planner's best", title_justify="left")
    for name in ("row", "model", "machine", "published", "step", "planned", "step", "by", "better ones"):
        table.add_column(name, justify="right" if name in ("step", "better ones") else "left", overflow="fold")
    for row in rows:
        known = f"{format_seconds(row['published_seconds'])}{'' if row['published_fits'] else '*'}"
        start = [row["row"], row["model"], row["machine"], row["published"], known]
        if row["best"] is None:
            table.add_row(*start, "nothing fits")
            continue
        share = row["below"] / row["fitting"]
        better = f"{row['below']:,} of {row['fitting']:,} ({share:.1%})"
        table.add_row(*start, row["best"], format_seconds(row["best_seconds"]), WORDS[row["term"]], better)
    console = Console(width=160)
    console.print(table, highlight=False)
    console.print("* does not fit by this project's memory model: it was run with other kernels or offloading")
    console.print(summary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    recipes = {
        row: recipe for row, recipe in distinct_recipes().items() if options.only in f"{row} {recipe.model.name}"
    }
    rows = [compare(row, recipe) for row, recipe in list(recipes.items())[: options.most]]
    summary = summary_of(rows)
    print_rows(rows, summary)
    if options.json:
        options.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

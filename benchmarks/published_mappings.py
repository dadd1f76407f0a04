"""Published mappings beside the planner's: is its best at least as good, and how high does the published one rank?

python -m benchmarks.published_mappings [--only WORD] [--most N] [--rank-only] [--sample N] [--json FILE]

Every distinct recipe of the shipped rows (`pipermoe validate`) that is complete. Both strategies are predicted by the
same model, under the software profile of the row. The rank is the share of fitting strategies of the same schedule
whose lower bound of the step is below that of the published mapping, among legal ones drawn at random: all degrees of
both arrangements, chunks up to the mapping's, micro-batches, recomputation and ZeRO levels (20,000: a share of 1 % is
known to within 0.2 %). `--rank-only` leaves the search for the best out.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import parser_of, write_json
from pipermoe.planner.axes import divisors
from pipermoe.planner.candidate import candidate
from pipermoe.planner.job import Job
from pipermoe.planner.search import Field
from pipermoe.report.plan import WORDS
from pipermoe.resources.bound import step_bound
from pipermoe.resources.evaluate import evaluate
from pipermoe.schedule.legality import POSSIBLE
from pipermoe.specs.legality import legal_mask
from pipermoe.specs.report import TERMS
from pipermoe.specs.strategy import RECOMPUTE_MODULES, Strategy
from pipermoe.specs.strategy_table import RECOMPUTE_NAMES, StrategyTable
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import format_seconds
from pipermoe.validate.recipe import NotCovered, Recipe, recipe_of
from pipermoe.validate.rows import published_rows

TOP = 0.01
INNER = ("pipeline_parallel", "context_parallel", "tensor_parallel", "expert_parallel", "expert_tensor_parallel")
DRAWS = 200  # for one that is legal
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


def drawn(job: Job, strategy: Strategy, count: int) -> StrategyTable:
    """Legal strategies of the published one's schedule, drawn at random: degrees, micro-batch, recomputation, ZeRO."""
    draw, world = np.random.default_rng(0), job.world_size
    size, degrees = DRAWS * count, divisors(world)
    table = StrategyTable.of([strategy]).take(np.zeros(size, dtype=np.int64))
    columns = {name: draw.choice(degrees, size) for name in INNER}
    recompute = draw.choice(len(RECOMPUTE_NAMES), size)
    modules = draw.integers(1, 1 << len(RECOMPUTE_MODULES), size)
    columns |= {
        "micro_batch_size": draw.choice(divisors(job.train.global_batch_size), size),
        "virtual_stages": draw.integers(1, strategy.virtual_stages + 1, size),
        "recompute": recompute,
        "recompute_modules": np.where(recompute == RECOMPUTE_NAMES.index("selective"), modules, 0),
        "layer_split": np.zeros(size, dtype=np.int64),
        "zero_dense": draw.integers(0, 4, size),
        "zero_expert": draw.integers(0, 4, size),
    }
    dense = columns["context_parallel"] * columns["tensor_parallel"]
    columns["data_parallel"] = np.maximum(world // (columns["pipeline_parallel"] * dense), 1)
    inside = columns["data_parallel"] * dense
    experts = columns["expert_parallel"] * columns["expert_tensor_parallel"]
    columns["expert_data_parallel"] = np.maximum(inside // experts, 1)
    table = table.with_columns(**columns)
    legal = legal_mask(table, job.model, job.train, world, POSSIBLE)
    return table.take(np.flatnonzero(legal)[:count])


def rank_of(job: Job, table: StrategyTable, bound: float) -> tuple[int, int]:
    """How many of the drawn strategies fit and have a lower bound below `bound`, and how many fit."""
    found = evaluate(job.model, job.platform, job.train, table, job.imbalance)
    fits = found.peak_bytes <= job.memory_budget_bytes
    return int(np.count_nonzero(fits & (found.bound < bound))), int(np.count_nonzero(fits))


def compare(row_id: str, recipe: Recipe, options: argparse.Namespace) -> dict:
    """One row of the table."""
    strategy, model, platform, train = recipe.strategy, recipe.model, recipe.platform, recipe.train
    job = Job(model, platform, train, strategy.world_size, platform.memory_budget_bytes, runtimes=((),))
    published = candidate(job, strategy)
    bound = float(step_bound(model, platform, train, StrategyTable.of([strategy]), job.imbalance)[0])
    below, fitting = rank_of(job, drawn(job, strategy, options.sample), bound)
    row = {
        "row": row_id,
        "model": model.name,
        "machine": f"{strategy.world_size} {platform.name}",
        "published": strategy_text(strategy),
        "published_seconds": published.step_seconds,
        "published_fits": published.peak_bytes <= job.memory_budget_bytes,
        "measured_seconds": recipe.measured_seconds,
        "below": below,
        "fitting": fitting,
    }
    if options.rank_only:
        return row
    field = Field.of(job)
    ranking = field.best()
    if not ranking.best:
        return row
    chosen = field.space.strategy(ranking.best[0].place)
    best = candidate(job, chosen)
    saved = {term: published.seconds[term] - best.seconds[term] for term in TERMS}
    term = max(TERMS, key=saved.__getitem__)
    return row | {"best": strategy_text(chosen), "best_seconds": best.step_seconds, "term": term}


def summary_of(rows: list[dict]) -> dict:
    shares = np.array([row["below"] / row["fitting"] for row in rows if row["fitting"]])
    searched = [row for row in rows if "best" in row]
    gains = [row["published_seconds"] / row["best_seconds"] for row in searched] or [1.0]
    return {
        "mappings": len(rows),
        "ranked": len(shares),
        "in_top_1_percent": int(np.count_nonzero(shares <= TOP)),
        "rank_quantiles": {f"{q:.0%}": float(np.quantile(shares, q)) for q in QUANTILES} if len(shares) else {},
        "published_does_not_fit_here": sum(not row["published_fits"] for row in rows),
        "searched": len(searched),
        "best_at_least_as_good": sum(row["best_seconds"] <= row["published_seconds"] for row in searched),
        "median_speedup": float(np.median(gains)),
    }


def print_rows(rows: list[dict], summary: dict) -> None:
    table = Table(box=None, pad_edge=False, title="Published mappings and the planner's best", title_justify="left")
    for name in ("row", "model", "machine", "published", "step", "rank", "planned", "step", "gain by"):
        table.add_column(name, justify="right" if name in ("step", "rank") else "left", overflow="fold")
    for row in rows:
        step = f"{format_seconds(row['published_seconds'])}{'' if row['published_fits'] else '*'}"
        share = f"{row['below'] / row['fitting']:.2%}" if row["fitting"] else "none fits"
        best = [row["best"], format_seconds(row["best_seconds"]), WORDS[row["term"]]] if "best" in row else []
        table.add_row(row["row"], row["model"], row["machine"], row["published"], step, share, *best)
    console = Console(width=150)
    console.print(table, highlight=False)
    console.print(
        "* does not fit by this project's memory model: run with other kernels or offloading", highlight=False
    )
    console.print(summary)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--rank-only", action="store_true")
    parser.add_argument("--sample", type=int, default=20_000)
    options = parser.parse_args()
    recipes = {
        row: recipe for row, recipe in distinct_recipes().items() if options.only in f"{row} {recipe.model.name}"
    }
    chosen = list(recipes.items())[: options.most]
    rows = [compare(row, recipe, options) for row, recipe in chosen]
    summary = summary_of(rows)
    print_rows(rows, summary)
    write_json(options, {"summary": summary, "rows": rows})


if __name__ == "__main__":
    main()

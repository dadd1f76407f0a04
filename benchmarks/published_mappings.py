"""Published mappings beside the planner's: is its best at least as good, and how high does the published one rank?

python -m benchmarks.published_mappings [--only WORD] [--most N] [--rank-only] [--sample N] [--seconds N] [--json FILE]

Every distinct recipe of the shipped rows (`pipermoe validate`) that is complete. Both strategies are predicted by the
same model, under the software profile of the row. The rank is the share of fitting strategies whose lower bound of the
step is below that of the published mapping, among legal ones of its schedule and dispatch drawn at random from the
planner's axes: all degrees of both arrangements, chunks up to the mapping's, order of ranks, micro-batches,
recomputation and ZeRO levels (20,000: a share of 1 % is known to within 0.1 %). For the rank, gradients are reduced and
weights gathered beside computing, as published stacks do and `pipermoe validate` predicts. `--rank-only` leaves the
search for the best out: the mapping then stands beside the best of those drawn.

The best is searched in the whole space, within the memory of the machine. Where the mapping itself holds more than that
(the source does not say what it recomputes, or it offloads), and is faster than what fits, the best is searched again
within what the mapping holds. A search may take `--seconds` of CPU time. FILE is written after every mapping, and what
stands in it is not done again: the command, stopped and repeated, goes on.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.command_line import parser_of, write_json
from pipermoe.planner.axes import TAIL_COLUMNS, WAY_COLUMNS, all_bodies, all_tails
from pipermoe.planner.candidate import candidate
from pipermoe.planner.job import Job
from pipermoe.planner.result import Candidate
from pipermoe.planner.search import ROUNDING, Field
from pipermoe.report.plan import WORDS
from pipermoe.resources.bound import step_bound
from pipermoe.resources.floor import memory_floor
from pipermoe.resources.hidden_sync import hide_sync
from pipermoe.resources.kinds import distinct
from pipermoe.resources.peak import peak_bytes
from pipermoe.resources.step import placement_of, step_costs
from pipermoe.schedule.legality import POSSIBLE
from pipermoe.specs.legality import legal_mask
from pipermoe.specs.report import TERMS
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import RANK_ORDERS, StrategyTable
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.units import format_seconds
from pipermoe.validate.recipe import NotCovered, Recipe, recipe_of
from pipermoe.validate.rows import published_rows

TOPS = (0.001, 0.01, 0.05, 0.1)
DRAWS = 20  # for one that is legal
WEIGHED = 128  # to say what share fits
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
    """Legal strategies of the published one's schedule and dispatch, drawn at random from the planner's axes."""
    draw, world, size = np.random.default_rng(0), job.world_size, DRAWS * count
    published, tails, bodies = (
        StrategyTable.of([strategy]),
        all_tails(job.model, job.platform),
        all_bodies(job.train, world),
    )
    same = np.logical_and.reduce([getattr(tails, name) == getattr(published, name) for name in WAY_COLUMNS])
    tail = tails.take(draw.choice(np.flatnonzero(same), size))
    body = bodies.take(draw.choice(np.flatnonzero(legal_mask(bodies, job.model, job.train, world)), size))
    table = body.with_columns(
        schedule=np.repeat(published.schedule, size),
        virtual_stages=draw.integers(1, strategy.virtual_stages + 1, size),
        rank_order=draw.choice(len(RANK_ORDERS), size) * (body.pipeline_parallel > 1),
        **{name: getattr(tail, name) for name in TAIL_COLUMNS},
    )
    return table.take(np.flatnonzero(legal_mask(table, job.model, job.train, world, POSSIBLE))[:count])


def stack_bound(job: Job, table: StrategyTable) -> NDArray[np.float64]:
    """Lower bounds of the step (rows,) less what `hide_sync` hides on the rank where that is most."""
    model, platform, train = job.model, job.platform, job.train
    hidden, kinds = np.zeros(len(table)), distinct([table.pipeline_parallel, table.virtual_stages])
    for kind in range(len(kinds.rows)):
        rows = np.flatnonzero(kinds.of == kind)
        uniform = table.take(rows)
        costs = step_costs(model, platform, train, uniform)
        left = hide_sync(costs, train, uniform, placement_of(model, uniform).stages_of)
        hidden[rows] = (costs.reduce - left.reduce).max(axis=1) + (costs.gather - left.gather).max(axis=1)
    return step_bound(model, platform, train, table) - hidden


def fitting(job: Job, table: StrategyTable) -> float:
    """How many rows, in no order, fit: of those that the floor of their memory lets, the share of `WEIGHED` of them."""
    floors = memory_floor(job.model, job.train, table, job.imbalance)
    light = np.flatnonzero(floors <= job.memory_budget_bytes)
    return len(light) * float(np.mean(_fits(job, table.take(light[:WEIGHED])))) if len(light) else 0.0


def first_that_fits(job: Job, table: StrategyTable) -> Strategy | None:
    """The first row that fits."""
    light = np.flatnonzero(memory_floor(job.model, job.train, table, job.imbalance) <= job.memory_budget_bytes)
    return next((table.row(int(row)) for row in light if _fits(job, table.take(np.array([row])))[0]), None)


def _fits(job: Job, table: StrategyTable) -> NDArray[np.bool_]:
    return peak_bytes(job.model, job.train, table, imbalance=job.imbalance) <= job.memory_budget_bytes


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes more CPU seconds."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:g} CPU seconds")

    before = signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def job_of(recipe: Recipe) -> Job:
    """The job of a published mapping, planned for whatever runs it."""
    platform, world = recipe.platform, recipe.strategy.world_size
    return Job(recipe.model, platform, recipe.train, world, platform.memory_budget_bytes, runtimes=((),))


def ranked(job: Job, row_id: str, recipe: Recipe, options: argparse.Namespace) -> dict:
    """A mapping, how high it ranks, and the best of what was drawn."""
    strategy, model, platform = recipe.strategy, job.model, job.platform
    published, table = candidate(job, strategy), drawn(job, strategy, options.sample)
    [bound], bounds = stack_bound(job, StrategyTable.of([strategy])), stack_bound(job, table)
    faster = table.take(np.flatnonzero(bounds < bound))
    below, others = fitting(job, faster), fitting(job, table.take(np.flatnonzero(bounds >= bound)))
    row = {
        "row": row_id,
        "model": model.name,
        "machine": f"{strategy.world_size} {platform.name}",
        "job": _job_text(recipe),
        "published": strategy_text(strategy),
        "published_seconds": published.step_seconds,
        "published_fits": published.peak_bytes <= job.memory_budget_bytes,
        "measured_seconds": recipe.measured_seconds,
        "share_below": below / (below + others) if below + others else None,
    }
    drawn_best = first_that_fits(job, faster.take(np.argsort(bounds[bounds < bound])))
    return row | (beside(published, candidate(job, drawn_best)) if drawn_best else {})


def searched(field: Field, recipe: Recipe, seconds: float) -> dict:
    """The best strategy of a mapping's job, or why it is not known."""
    published = candidate(field.job, recipe.strategy)
    try:
        with limited(seconds):
            best, within = best_of(field), field.job.memory_budget_bytes
            if best is None or (best.step_seconds > published.step_seconds and published.peak_bytes > within):
                best, within = best_of(field, published.peak_bytes), published.peak_bytes
    except TimeoutError as reason:
        return {"not_searched": str(reason)}
    assert best is not None, "the mapping itself fits what it holds"
    return beside(published, best) | {"searched_within_bytes": within}


def best_of(field: Field, memory_budget_bytes: float | None = None) -> Candidate | None:
    """The fastest that fits, if anything does."""
    best = field.best(memory_budget_bytes=memory_budget_bytes).best
    return candidate(field.job, field.space.strategy(best[0].place)) if best else None


def beside(published: Candidate, best: Candidate) -> dict:
    """The better strategy, and the term by which it gains most."""
    saved = {term: published.seconds[term] - best.seconds[term] for term in TERMS}
    return {
        "best": strategy_text(best.strategy),
        "best_seconds": best.step_seconds,
        "saved_seconds": saved,
        "term": max(TERMS, key=saved.__getitem__),
    }


def compared(recipes: dict[str, Recipe], options: argparse.Namespace) -> Iterator[dict]:
    """A row for every mapping, those of one job after each other; what `--json` holds of an earlier run is kept."""
    earlier = {row["row"]: row for row in _written(options)}
    in_order = sorted(recipes.items(), key=lambda each: (each[1].model.name, each[1].platform.name, _work(each[1])))
    for job, mappings in groupby(in_order, key=lambda each: job_of(each[1])):
        field = None
        for row_id, recipe in mappings:
            row = earlier.get(row_id) or ranked(job, row_id, recipe, options)
            if not options.rank_only and "searched_within_bytes" not in row:
                field = field or Field.of(job)
                row |= searched(field, recipe, options.seconds)
            yield row


def _work(recipe: Recipe) -> tuple:
    train = recipe.train
    return recipe.software, recipe.strategy.world_size, train.seq_len, train.global_batch_size, train.precision


def _written(options: argparse.Namespace) -> list[dict]:
    """The rows of an earlier run."""
    return json.loads(options.json.read_text())["rows"] if options.json and options.json.exists() else []


def _job_text(recipe: Recipe) -> str:
    train, world = recipe.train, recipe.strategy.world_size
    batch = f"{train.global_batch_size} x {train.seq_len} {train.precision}"
    return f"{recipe.model.name}, {batch}, {world} {recipe.platform.name}, {recipe.software}"


def summary_of(rows: list[dict]) -> dict:
    searched_rows = [row for row in rows if "searched_within_bytes" in row]
    fastest = {row["job"]: row for row in sorted(rows, key=lambda row: row["measured_seconds"], reverse=True)}
    return {
        "ranks": ranks_of(rows),
        "ranks_of_the_fastest_measured_of_each_job": ranks_of(list(fastest.values())),
        "published_does_not_fit_here": sum(not row["published_fits"] for row in rows),
        "not_searched": {row["row"]: row["not_searched"] for row in rows if "not_searched" in row},
        "searched": gains_of(searched_rows),
        "searched_and_fit": gains_of([row for row in searched_rows if row["published_fits"]]),
    }


def ranks_of(rows: list[dict]) -> dict:
    """How many rank how high."""
    shares = np.array([row["share_below"] for row in rows if row["share_below"] is not None])
    return {
        "mappings": len(rows),
        "ranked": len(shares),
        "in_top": {f"{top:.1%}": int(np.count_nonzero(shares <= top)) for top in TOPS},
        "quantiles": {f"{q:.0%}": float(np.quantile(shares, q)) for q in (*QUANTILES, 1)} if len(shares) else {},
    }


def gains_of(rows: list[dict]) -> dict:
    """How much faster the planner's best is, and what it saves most of, over some rows."""
    gains = np.array([row["published_seconds"] / row["best_seconds"] for row in rows])
    return {
        "mappings": len(rows),
        "best_at_least_as_good": int(np.count_nonzero(gains >= 1 - ROUNDING)),
        "gain_quantiles": {f"{q:.0%}": float(np.quantile(gains, q)) for q in (0, *QUANTILES, 1)} if len(rows) else {},
        "terms": dict(Counter(row["term"] for row in rows).most_common()),
    }


def print_rows(rows: list[dict], summary: dict) -> None:
    table = Table(box=None, pad_edge=False, title="Published mappings and the planner's best", title_justify="left")
    for name in ("row", "model", "machine", "published", "step", "rank", "planned", "step", "gain by"):
        table.add_column(name, justify="right" if name in ("step", "rank") else "left", overflow="fold")
    for row in rows:
        step = f"{format_seconds(row['published_seconds'])}{'' if row['published_fits'] else '*'}"
        share = "none fits" if row["share_below"] is None else f"{row['share_below']:.2%}"
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
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    recipes = distinct_recipes()
    chosen = [row for row, recipe in recipes.items() if options.only in f"{row} {recipe.model.name}"][: options.most]
    if not chosen:
        parser.error(f"--only {options.only}: no row or model has this in its name, such as r0001 or qwen3")
    rows = {row["row"]: row for row in _written(options)}
    progress = Console(stderr=True)
    for row in track(compared({row: recipes[row] for row in chosen}, options), total=len(chosen), console=progress):
        rows[row["row"]] = row
        write_json(options, _found(rows))
    found = _found(rows)
    print_rows(found["rows"], found["summary"])


def _found(rows: dict[str, dict]) -> dict:
    in_order = [rows[row] for row in sorted(rows)]
    return {"summary": summary_of(in_order), "rows": in_order}


if __name__ == "__main__":
    main()

"""Predicted beside measured for every published row, and what the errors add up to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from pipermoe.specs.base import Frozen
from pipermoe.specs.report import Term
from pipermoe.specs.software import load_software
from pipermoe.validate.paper import PaperRow, paper_rows
from pipermoe.validate.predict import Prediction, predict_step
from pipermoe.validate.recipe import NotCovered, Recipe, recipe_of
from pipermoe.validate.rows import PublishedRow

FEWEST_MAPPINGS = 5  # for a rank correlation
ONE_NODE = 8  # GPUs

# fit: the row calibrated its software profile; twin: another row of the same recipe did; unseen: neither. assumed: the
# micro-batch is not published; such rows rank mappings, but their errors are not counted.
Role = Literal["fit", "twin", "unseen", "assumed"]


class RowResult(Frozen):
    """One row: seconds of a step measured and predicted; `terms` are those of the busiest pipeline rank."""

    id: str
    source: str
    model: str
    gpu: str
    n_gpus: int
    strategy: str
    precision: str
    software: str
    tokens: int
    role: Role
    measured_seconds: float
    predicted_seconds: float
    terms: dict[Term, float]

    @property
    def error(self) -> float:
        return self.predicted_seconds / self.measured_seconds - 1


class Summary(Frozen):
    """Absolute relative errors of some rows."""

    name: str
    rows: int
    mean: float
    median: float
    p90: float
    bias: float


class RankGroup(Frozen):
    """Mappings of one job on one machine under one software: Spearman's correlation of predicted and measured.

    `assumed`: the micro-batch of some is not published.
    """

    model: str
    gpu: str
    n_gpus: int
    software: str
    assumed: bool
    mappings: int
    correlation: float


class Validation(Frozen):
    """All of it; `not_covered` maps the id of each row that was not predicted to the reason.

    `paper` has the rows of the paper and of X-MoE with the best strategy on as many GCDs, where that was asked for.
    """

    rows: tuple[RowResult, ...]
    not_covered: dict[str, str]
    fitted_on: dict[str, tuple[str, ...]]
    by_source: tuple[Summary, ...]
    overall: tuple[Summary, ...]
    ranks: tuple[RankGroup, ...]
    paper: tuple[PaperRow, ...] = ()


def validate_rows(rows: Sequence[PublishedRow], *, paper: bool = False) -> Validation:
    """Predict every row that can be predicted; with `paper` plan those of the paper anew, which takes longer."""
    recipes: list[tuple[PublishedRow, Recipe]] = []
    not_covered = {}
    for row in rows:
        try:
            recipes.append((row, recipe_of(row)))
        except NotCovered as reason:
            not_covered[row.id] = str(reason)
    fitted_on = {name: load_software(name).fitted_on for name in sorted({r.software for _, r in recipes})}
    calibrating = {row_id for ids in fitted_on.values() for row_id in ids}
    seen = {_mapping(recipe) for row, recipe in recipes if row.id in calibrating}
    results = []
    for row, recipe in recipes:
        role: Role = "fit" if row.id in calibrating else "twin" if _mapping(recipe) in seen else "unseen"
        results.append(_result(row, recipe, "assumed" if recipe.assumed else role, predict_step(recipe)))
    judged = [result for result in results if result.role in ("twin", "unseen")]
    sources = dict.fromkeys(result.source for result in judged)
    several = [result for result in judged if result.n_gpus > ONE_NODE]
    overall = {
        "not used for fitting": judged,
        "not used for fitting, more than 8 GPUs": several,
        "recipe in no fit, more than 8 GPUs": [result for result in several if result.role == "unseen"],
    }
    return Validation(
        rows=tuple(results),
        not_covered=not_covered,
        fitted_on=fitted_on,
        by_source=tuple(summary(name, [r for r in judged if r.source == name]) for name in sources),
        overall=tuple(summary(name, chosen) for name, chosen in overall.items() if chosen),
        ranks=tuple(_rank_groups([result for result in results if result.role != "fit"])),
        paper=tuple(paper_rows(rows)) if paper else (),
    )


def _mapping(recipe: Recipe) -> tuple:
    job = recipe.train.seq_len, recipe.train.global_batch_size, recipe.train.precision
    return recipe.model.name, recipe.platform.name, recipe.strategy, *job


def _result(row: PublishedRow, recipe: Recipe, role: Role, prediction: Prediction) -> RowResult:
    return RowResult(
        id=row.id,
        source=row.source,
        model=recipe.model.name,
        gpu=row.gpu,
        n_gpus=recipe.strategy.world_size,
        strategy=recipe.strategy.compact(),
        precision=recipe.train.precision,
        software=recipe.software,
        tokens=recipe.train.tokens_per_step,
        role=role,
        measured_seconds=recipe.measured_seconds,
        predicted_seconds=prediction.step_seconds,
        terms=prediction.terms,
    )


def summary(name: str, results: Sequence[RowResult]) -> Summary:
    """Mean, median and 90th percentile of |predicted / measured - 1|; bias is the median with its sign."""
    errors = np.array([result.error for result in results])
    sizes = np.abs(errors)
    return Summary(
        name=name,
        rows=len(errors),
        mean=float(sizes.mean()),
        median=float(np.median(sizes)),
        p90=float(np.quantile(sizes, 0.9)),
        bias=float(np.median(errors)),
    )


def _rank_groups(results: Iterable[RowResult]) -> Iterable[RankGroup]:
    groups: dict[tuple[str, str, int, str, int], dict[str, list[RowResult]]] = {}
    for result in results:
        job = result.model, result.gpu, result.n_gpus, result.software, result.tokens
        groups.setdefault(job, {}).setdefault(f"{result.strategy} {result.precision}", []).append(result)
    for (model, gpu, n_gpus, software, _), mappings in groups.items():
        if len(mappings) >= FEWEST_MAPPINGS:
            measured = [_mean(result.measured_seconds for result in same) for same in mappings.values()]
            predicted = [_mean(result.predicted_seconds for result in same) for same in mappings.values()]
            yield RankGroup(
                model=model,
                gpu=gpu,
                n_gpus=n_gpus,
                software=software,
                assumed=any(result.role == "assumed" for same in mappings.values() for result in same),
                mappings=len(mappings),
                correlation=spearman(measured, predicted),
            )


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    one, other = (_ranks(np.asarray(values, dtype=float)) for values in (first, second))
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])

"""From the seconds of every step and rank to what a run measured: a StepReport whose terms add up to its step time."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from pipermoe.specs.report import TERMS, RankReport, StepReport, Term

WARM_UP_STEPS = 2  # first touches of memory and first connections of every pair of ranks make them slower


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """How long one step took on one rank, and the terms that it timed (all but "other")."""

    step: int
    seconds: float
    terms: dict[Term, float]


def counted_step(first: int, steps: int) -> int:
    """The step of a run of steps first..steps-1 that is executed under the counters: the first after warm-up."""
    return min(first + WARM_UP_STEPS, steps - 1)


def measured_steps(first: int, steps: int) -> range:
    """The steps whose time counts: those after the counted one, all of them in runs too short to have such."""
    after = range(counted_step(first, steps) + 1, steps)
    return after or range(first, steps)


def central_half(seconds: list[float]) -> list[int]:
    """Indices of the values between the quartiles: their mean resists outliers as a median does, and it adds up."""
    order = sorted(range(len(seconds)), key=seconds.__getitem__)
    cut = len(order) // 4
    return order[cut : len(order) - cut]


def step_report(reports: list[RankReport], timings: list[list[StepSeconds]]) -> StepReport:
    """One average step from what each rank counted (`reports`) and timed (`timings`, the measured steps of each rank).

    A step lasts as long as on its slowest rank. Step time and terms are means over the central half of the steps;
    "other" is what no term holds, so the terms of every rank add up to the step time.
    """
    walls = [max(rank.seconds for rank in step) for step in zip(*timings, strict=True)]
    chosen = central_half(walls)
    step_seconds = fmean(walls[i] for i in chosen)
    ranks = []
    for report, timing in zip(reports, timings, strict=True):
        terms = {term: fmean(timing[i].terms.get(term, 0.0) for i in chosen) for term in TERMS if term != "other"}
        ranks.append(report.model_copy(update={"seconds": {**terms, "other": step_seconds - sum(terms.values())}}))
    return StepReport(step_seconds=step_seconds, ranks=tuple(ranks))

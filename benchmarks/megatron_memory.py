#!/usr/bin/env python3
"""The memory profile of Megatron-Core beside measured runs, and beside other estimators on the same points.

    python -m benchmarks.megatron_memory [--json FILE]

benchmarks/data/megatron_memory.json holds the measurements and where they come from. Every prediction assumes balanced
routing; `rows x` is the imbalance that would explain what is missing at the peak. A case is the mean over its runs, and
its scatter how far apart the peaks of runs with equal arguments, release and GPU are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.command_line import parser_of, write_json
from pipermoe.resources.megatron.job import Machine, MegatronJob
from pipermoe.resources.megatron.peak import peak_memory
from pipermoe.resources.megatron.reader import read_job, undescribed
from pipermoe.specs.megatron.arguments import Arguments

DATA = Path(__file__).parent / "data" / "megatron_memory.json"
MIB, GIB = 2**20, 2**30
OLD_CONTAINER = "24.01"
OLD_RELEASE = f"PyTorch container {OLD_CONTAINER} with TransformerEngine 1.2; described is TransformerEngine from 2.1"
RECORDED = ("case", "result", "release", "gpu", "static_bytes", "peak_bytes", "second_step_peak_bytes")
LOADED = "peak of loading a checkpoint: constant from the first step of a resumed run"


@dataclass(frozen=True, slots=True)
class Row:
    """One measured run. Errors are predicted / measured - 1; None where the profile does not cover the run."""

    case: str
    result: str
    release: str
    gpu: str
    static_bytes: int
    peak_bytes: int
    second_step_peak_bytes: int
    predicted_static: float | None
    predicted_peak: float | None
    rows_needed: float | None
    not_covered: str

    @property
    def static_error(self) -> float | None:
        return None if self.predicted_static is None else self.predicted_static / self.static_bytes - 1

    @property
    def peak_error(self) -> float | None:
        return None if self.predicted_peak is None else self.predicted_peak / self.peak_bytes - 1

    @property
    def second_step_error(self) -> float | None:
        return None if self.predicted_peak is None else self.predicted_peak / self.second_step_peak_bytes - 1


def evaluate() -> list[Row]:
    """Every recorded run of Megatron-LM's functional tests; the last pipeline rank wrote the record."""
    return [_evaluate(record) for record in json.loads(DATA.read_text())["results"]]


def _evaluate(record: dict[str, Any]) -> Row:
    arguments = Arguments.of(record["arguments"])
    reasons = [*undescribed(arguments), *([OLD_RELEASE] if record["container"] == OLD_CONTAINER else [])]
    measured = {key: record[key] for key in RECORDED}
    if reasons:
        return Row(
            **measured, predicted_static=None, predicted_peak=None, rows_needed=None, not_covered="; ".join(reasons)
        )
    job = read_job(arguments, record["world_size"], record["compute_capability"], record["release"])
    machine = Machine.of(record["compute_capability"], record["cublas_workspace_bytes"])
    peak = peak_memory(job, machine, job.strategy.pipeline_parallel - 1)
    loaded = record["result"].endswith("_2nd")
    return Row(
        **measured,
        predicted_static=peak.static.total,
        predicted_peak=None if loaded else peak.total,
        rows_needed=None if loaded else _rows_needed(job, machine, record["peak_bytes"]),
        not_covered=LOADED if loaded else "",
    )


def _rows_needed(job: MegatronJob, machine: Machine, peak_bytes: int) -> float:
    """The imbalance of routing at which the prediction, piecewise linear in the rows, meets the measurement."""
    imbalance = 1.0
    for _ in range(3):  # Newton's method
        here, beyond = (_last_rank_peak(job, machine, imbalance + step) for step in (0.0, 0.01))
        imbalance += 0.01 * (peak_bytes - here) / (beyond - here)
    return imbalance


def _last_rank_peak(job: MegatronJob, machine: Machine, imbalance: float) -> float:
    return peak_memory(replace(job, routing_imbalance=imbalance), machine, job.strategy.pipeline_parallel - 1).total


@dataclass(frozen=True, slots=True)
class Case:
    """Runs of equal arguments, on any release and GPU: mean errors, each against the prediction for its own machine.

    `scatter` is the largest over the smallest peak of runs that also share release and GPU, less 1; None without any.
    """

    name: str
    runs: int
    peak_error: float
    second_step_error: float
    scatter: float | None


def cases_of(rows: list[Row]) -> list[Case]:
    """One for every case with a peak that the profile covers."""
    covered = [row for row in rows if row.peak_error is not None]
    return [
        _case(name, [row for row in covered if row.case == name]) for name in dict.fromkeys(row.case for row in covered)
    ]


def _case(name: str, rows: list[Row]) -> Case:
    alike: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        alike.setdefault((row.release, row.gpu), []).append(row.peak_bytes)
    scatter = max((max(peaks) / min(peaks) - 1 for peaks in alike.values() if len(peaks) > 1), default=None)
    peak, second = (mean(getattr(row, error) for row in rows) for error in ("peak_error", "second_step_error"))
    return Case(name, len(rows), peak, second, scatter)


@dataclass(frozen=True, slots=True)
class Point:
    """A run without imbalance that other estimators were run on, too: GiB of the largest rank."""

    name: str
    measured: float
    predicted: float
    others: dict[str, float]
    stage_errors: tuple[float, ...] = ()  # where the stages were measured one by one

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def evaluate_points() -> list[Point]:
    """DeepSeek models of four layers, experts padded to their capacity."""
    points = []
    for record in json.loads(DATA.read_text())["points"]["rows"]:
        arguments = Arguments.of(record["arguments"])
        job = read_job(arguments, record["world_size"], record["compute_capability"])
        machine = Machine.of(record["compute_capability"])
        peaks = [peak_memory(job, machine, rank).total for rank in range(job.strategy.pipeline_parallel)]
        measured = record.get("peak_mib_by_stage", [])
        errors = tuple(peak / MIB / mib - 1 for peak, mib in zip(peaks, measured, strict=False))
        points.append(Point(record["name"], record["peak_gib"], max(peaks) / GIB, record["estimates_gib"], errors))
    return points


@dataclass(frozen=True, slots=True)
class Summary:
    """Absolute errors over the covered runs."""

    runs: int
    covered_static: int
    covered_peak: int
    static_mean: float
    static_worst: float
    peak_mean: float
    peak_worst: float
    cases: int
    case_mean: float
    case_worst: float
    second_step_mean: float
    second_step_worst: float
    points_mean: float
    points_worst: float


def summarise(rows: list[Row], points: list[Point]) -> Summary:
    static = [abs(row.static_error) for row in rows if row.static_error is not None]
    peak = [abs(row.peak_error) for row in rows if row.peak_error is not None]
    second = [abs(row.second_step_error) for row in rows if row.second_step_error is not None]
    by_case = [abs(case.peak_error) for case in cases_of(rows)]
    exact = [abs(point.error) for point in points]
    return Summary(
        runs=len(rows),
        covered_static=len(static),
        covered_peak=len(peak),
        static_mean=mean(static),
        static_worst=max(static),
        peak_mean=mean(peak),
        peak_worst=max(peak),
        cases=len(by_case),
        case_mean=mean(by_case),
        case_worst=max(by_case),
        second_step_mean=mean(second),
        second_step_worst=max(second),
        points_mean=mean(exact),
        points_worst=max(exact),
    )


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown: covered runs with errors, then the others with the reason."""
    yield "| run | static GiB | predicted | error | peak GiB | predicted | error | at step 2 | rows x |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        if row.predicted_static is None or row.static_error is None:
            continue
        static = f"{row.static_bytes / GIB:.3f} | {row.predicted_static / GIB:.3f} | {row.static_error:+.2%}"
        peak = "| | | | |"
        if row.predicted_peak is not None and row.peak_error is not None and row.second_step_error is not None:
            peak = (
                f"{row.peak_bytes / GIB:.3f} | {row.predicted_peak / GIB:.3f} | {row.peak_error:+.2%} "
                f"| {row.second_step_error:+.2%} | {row.rows_needed:.2f} |"
            )
        yield f"| {row.case} {row.result} | {static} | {peak}"
    yield ""
    yield "| not covered | why |"
    yield "|---|---|"
    for row in rows:
        if row.not_covered:
            part = "peak of " if row.predicted_static is not None else ""
            yield f"| {part}{row.case} {row.result} | {row.not_covered} |"


def cases_table(cases: list[Case]) -> Iterator[str]:
    """Markdown: peaks by case, beside how much runs of equal arguments and software differ."""
    yield "| case | runs | error of the peak | at step 2 | scatter of equal runs |"
    yield "|---|---|---|---|---|"
    for case in cases:
        scatter = "" if case.scatter is None else f"{case.scatter:.2%}"
        yield f"| {case.name} | {case.runs} | {case.peak_error:+.2%} | {case.second_step_error:+.2%} | {scatter} |"


def points_table(points: list[Point]) -> Iterator[str]:
    """Markdown: this profile beside the other estimators."""
    names = list(points[0].others)
    yield f"| point | measured GiB | pipermoe | {' | '.join(names)} |"
    yield "|---" * (3 + len(names)) + "|"
    for point in points:
        others = " | ".join(f"{value:.2f} ({value / point.measured - 1:+.1%})" for value in point.others.values())
        yield f"| {point.name} | {point.measured:.2f} | {point.predicted:.2f} ({point.error:+.1%}) | {others} |"
    means = [mean(abs(point.others[name] / point.measured - 1) for point in points) for name in names]
    own = mean(abs(point.error) for point in points)
    yield f"| mean absolute error | | {own:.1%} | {' | '.join(f'{value:.1%}' for value in means)} |"


def main() -> None:
    parser = parser_of(__doc__)
    options = parser.parse_args()
    rows, points = evaluate(), evaluate_points()
    summary = summarise(rows, points)
    print("\n".join([*table(rows), "", *cases_table(cases_of(rows)), "", *points_table(points), ""]))
    for name, value in asdict(summary).items():
        print(f"{name:20} {value:.2%}" if isinstance(value, float) else f"{name:20} {value}")
    found = {"summary": asdict(summary), "rows": list(map(asdict, rows)), "points": list(map(asdict, points))}
    write_json(options, found)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The resource model beside the dry run, case by case, its Megatron profile beside measured runs, and its speed.

    python -m benchmarks.resource_model [--only WORD] [--json FILE]

The cases are those of the tests (tests/resources/case_list.py): every schedule in several arrangements, all else pair
by pair. Step times are another benchmark's: benchmarks/step_time.py measures them beside their predictions.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from statistics import median

from tests.resources.case_list import Case, cases
from tests.resources.compared import compare

from benchmarks.command_line import parser_of, write_json
from benchmarks.megatron_memory import evaluate, evaluate_points, summarise, table
from benchmarks.million_rows import MILLION, speed_of, text_of
from benchmarks.planner import JOBS
from pipermoe.specs.units import format_bytes

LOWEST, HIGHEST = -0.01, 0.02  # the error of a peak that is good enough


@dataclass(frozen=True, slots=True)
class Row:
    """`equal`: FLOPs, weights, gradients and traffic of a rank of every stage, to the unit; peaks of the worst one."""

    case: str
    equal: bool
    predicted_peak_bytes: int
    counted_peak_bytes: int

    @property
    def peak_error(self) -> float:
        return self.predicted_peak_bytes / self.counted_peak_bytes - 1

    @property
    def within(self) -> bool:
        return LOWEST <= self.peak_error <= HIGHEST


def row_of(case: Case) -> Row:
    found = compare(case)
    return Row(str(case), found.equal, *found.peaks)


def print_row(row: Row) -> None:
    counts, peak = "equal" if row.equal else "UNEQUAL", format_bytes(row.predicted_peak_bytes)
    mark = "" if row.within else "  missed"
    print(
        f"{counts:>7}  {peak:>10}  {format_bytes(row.counted_peak_bytes):>10}  {row.peak_error:+7.2%}  {row.case}{mark}"
    )


def summary_of(rows: list[Row]) -> dict[str, float]:
    errors = [row.peak_error for row in rows]
    return {
        "cases": len(rows),
        "equal": sum(row.equal for row in rows),
        "peaks_within": sum(row.within for row in rows),
        "median_absolute_peak_error": median(map(abs, errors)),
        "lowest_peak_error": min(errors),
        "highest_peak_error": max(errors),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this word")
    options = parser.parse_args()
    print(" counts   predicted    dry run    error  case")
    rows = []
    for case in cases():
        if options.only in str(case):
            rows.append(row_of(case))
            print_row(rows[-1])
    summary = summary_of(rows)
    print(
        f"\n{summary['equal']} of {len(rows)} cases equal in FLOPs, parameters and traffic; {summary['peaks_within']} "
        f"peaks within {LOWEST:+.0%} and {HIGHEST:+.0%} (median of absolute errors "
        f"{summary['median_absolute_peak_error']:.2%}, {summary['lowest_peak_error']:+.1%} to "
        f"{summary['highest_peak_error']:+.1%})\n"
    )
    runs, points = evaluate(), evaluate_points()
    print(*table(runs), sep="\n")
    megatron = asdict(summarise(runs, points))
    print("\nMegatron-Core:", json.dumps(megatron))
    speeds = [speed_of(*job, MILLION) for job in JOBS]
    print(*map(text_of, speeds), sep="\n")
    cells = [asdict(row) | {"peak_error": row.peak_error} for row in rows]
    found = {"summary": summary, "cases": cells, "megatron": megatron, "speed": list(map(asdict, speeds))}
    write_json(options, found)


if __name__ == "__main__":
    main()

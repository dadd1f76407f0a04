"""How long it takes to build, check, lower and simulate pipeline schedules: CPU milliseconds, best of several.

python -m benchmarks.schedules [--json FILE]
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from benchmarks.command_line import parser_of, write_json
from pipermoe.schedule.action import Schedule
from pipermoe.schedule.builders import build
from pipermoe.schedule.checker import check
from pipermoe.schedule.communication import with_communication
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.timeline import simulate

CASES = (("1f1b", 16, 128, 1), ("interleaved-1f1b", 16, 128, 2), ("zb-v", 16, 128, 2), ("dualpipe-v", 16, 128, 2))
LAYERS = 61


def best_milliseconds(work: Callable[[], object], repeats: int = 5) -> float:
    """CPU time of the fastest of `repeats` calls: other load on the machine mostly does not count."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return 1e3 * min(times)


def uneven_durations(schedule: Schedule) -> Durations:
    """A model of 61 layers over the schedule's stages, one unit of time per layer, all-to-alls of a quarter unit."""
    base, longer = divmod(LAYERS, schedule.num_stages)
    layers = [float(base + (stage < longer)) for stage in range(schedule.num_stages)]
    return Durations(layers, layers, layers, forward_exchange=0.25, backward_exchange=0.25, transfer=0.03125)


def measure(name: str, pipeline_parallel: int, microbatches: int, virtual_stages: int) -> dict:
    schedule = build(name, pipeline_parallel, microbatches, virtual_stages)
    durations = uneven_durations(schedule)
    return {
        "schedule": f"{name} pp{pipeline_parallel} vpp{virtual_stages} m{microbatches}",
        "actions": sum(map(len, schedule.ranks)),
        "build_ms": best_milliseconds(lambda: build(name, pipeline_parallel, microbatches, virtual_stages), 3),
        "check_ms": best_milliseconds(lambda: check(schedule), 3),
        "lower_ms": best_milliseconds(lambda: with_communication(schedule), 3),
        "simulate_ms": best_milliseconds(lambda: simulate(schedule, durations), 9),
    }


def main() -> None:
    options = parser_of(__doc__).parse_args()
    rows = [measure(*case) for case in CASES]
    table = Table(title=f"Schedules of a {LAYERS}-layer model, CPU time", title_justify="left")
    for key in rows[0]:
        table.add_column(key.removesuffix("_ms") + (", ms" if key.endswith("_ms") else ""), justify="right")
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=100).print(table)
    write_json(options, rows)


if __name__ == "__main__":
    main()

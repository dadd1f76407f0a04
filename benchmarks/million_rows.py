"""How many strategies a second the floor of memory and the bound of time judge: a table of a million, and one by one.

    python -m benchmarks.million_rows [--only WORD] [--rows N] [--json FILE]

CPU seconds of one core. The rows are legal strategies of a job: heads in random order, each with all its tails. One by
one the same functions judge some of them, and must say the same to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.command_line import parser_of, write_json
from benchmarks.planner import JOBS
from pipermoe.planner.job import Job
from pipermoe.planner.search import Field
from pipermoe.resources.bound import grouped_bound, step_bound
from pipermoe.resources.floor import floor_prices, grouped_floor, memory_floor
from pipermoe.resources.groups import Groups
from pipermoe.resources.memory import prices
from pipermoe.resources.unit_seconds import unit_seconds
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.platform_file import load_platform
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig

MILLION = 1_000_000
ONE_BY_ONE = 40  # rows
REPEATS = 12  # beside other work a run takes up to half as long again


@dataclass(frozen=True, slots=True)
class Speed:
    """Rows per CPU second of a table, of each formula alone and of both, and of rows one by one."""

    job: str
    rows: int
    memory: float
    bound: float
    together: float
    one_by_one: float
    identical: bool


def rows_of(job: Job, rows: int, seed: int = 0) -> StrategyTable:
    """So many legal strategies of a job, or all if it has fewer."""
    space = Field.of(job).space
    heads = np.random.default_rng(seed).permutation(len(space.heads))
    enough = int(np.searchsorted(np.cumsum(space.open_tails[heads].sum(axis=1)), rows)) + 1
    return space.table(space.places(heads[:enough], space.select())[:rows])


def speed_of(model: str, platform: str, ranks: int, batch: int, rows: int) -> Speed:
    machine, spec = load_platform(platform), load_model(model)
    train = TrainConfig(seq_len=4096, global_batch_size=batch, precision="bf16")
    table = rows_of(Job(spec, machine, train, ranks, machine.memory_budget_bytes), rows)

    def both(table: StrategyTable) -> tuple[NDArray, NDArray]:
        groups = Groups(spec, train, table)
        memory = grouped_floor(spec, train, groups, floor_prices(partial(prices, spec, train)))
        return memory, grouped_bound(spec, machine, train, groups, partial(unit_seconds, spec, machine, train))

    few = np.linspace(0, len(table) - 1, ONE_BY_ONE).astype(np.int64)
    memory, bound = both(table)
    singles = [both(table.take(few[i : i + 1])) for i in range(len(few))]
    identical = all(
        memory[row] == held[0] and bound[row] == seconds[0] for row, (held, seconds) in zip(few, singles, strict=True)
    )
    return Speed(
        f"{model} on {ranks} {platform}",
        len(table),
        len(table) / _seconds(lambda: memory_floor(spec, train, table)),
        len(table) / _seconds(lambda: step_bound(spec, machine, train, table)),
        len(table) / _seconds(lambda: both(table)),
        len(few) / _seconds(lambda: [both(table.take(few[i : i + 1])) for i in range(len(few))]),
        identical,
    )


def _seconds(run: Callable[[], object]) -> float:
    """The fewest CPU seconds of some runs: what others do on the machine only adds."""
    found = []
    for _ in range(REPEATS):
        started = time.process_time()
        run()
        found.append(time.process_time() - started)
    return min(found)


def text_of(speed: Speed) -> str:
    same = "the same to the bit" if speed.identical else "DIFFERENT"
    return (
        f"{speed.job}: {speed.rows:,} rows; memory floor {speed.memory:,.0f}, time bound {speed.bound:,.0f}, both "
        f"{speed.together:,.0f} strategies per CPU second; one by one {speed.one_by_one:,.0f}, {same}"
    )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="", help="jobs whose model's name contains this word")
    parser.add_argument("--rows", type=int, default=MILLION)
    options = parser.parse_args()
    found = [speed_of(*job, options.rows) for job in JOBS if options.only in job[0]]
    print(*map(text_of, found), sep="\n")
    write_json(options, list(map(asdict, found)))


if __name__ == "__main__":
    main()

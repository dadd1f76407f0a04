"""Schedules as CSV, in the format of torch.distributed.pipelining: one line per rank, one cell per action.

A cell is `<stage><kind><microbatch>` (`0F1`, `3RECV_B2`, `1UNSHARD`) or an overlapped pair `(0F2;1B0)OVERLAP_F_B`;
empty cells are idle time and mean nothing. Source: torch/distributed/pipelining/schedules.py, `_Action.from_str`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipermoe.schedule.action import SHARDING, WHOLE_STAGE, Action, Kind, Schedule, overlap
from pipermoe.schedule.checker import check
from pipermoe.specs.documents import read_text, write_atomically
from pipermoe.specs.errors import UserError, describe_value

MOST_BYTES = 64 * 2**20
_CELL = re.compile(r"(\d+)([A-Z][A-Z_]*)(\d*)")
_PAIR = re.compile(r"\((.*);(.*)\)OVERLAP_F_B")


def to_csv(schedule: Schedule) -> str:
    """The schedule as text. A mirrored second copy cannot be written: ValueError."""
    if schedule.mirror_rank:
        raise ValueError(f"{schedule.name} holds two copies of every stage, which the CSV format cannot express")
    return "".join(",".join(map(str, actions)) + "\n" for actions in schedule.ranks)


def write_csv(schedule: Schedule, path: Path) -> None:
    """Write `to_csv`; UserError where the format has no room for the schedule."""
    if schedule.mirror_rank:
        raise UserError(describe_value(str(path), "schedule", schedule.name, "has no CSV form; nearest: dualpipe-v"))
    write_atomically(path, to_csv(schedule))


def read_csv(path: Path) -> Schedule:
    """A schedule from a file that torch or pipermoe wrote; UserError if it does not pass the checker.

    Number of stages and of micro-batches, and which rank holds which stage, follow from the cells.
    """
    lines = read_text(path, MOST_BYTES).splitlines()
    ranks = [list(_read_line(path, number, line)) for number, line in enumerate(lines, start=1) if line.strip()]
    if not any(ranks):
        raise UserError(f"{path}: holds no actions; expected one line per rank with cells such as 0F0")
    placed = [(part, rank) for rank, actions in enumerate(ranks) for action in actions for part in action.parts]
    stages, microbatches = (max(getattr(part, key) for part, _ in placed) + 1 for key in ("stage", "microbatch"))
    forwards = sum(part.kind is Kind.FORWARD for part, _ in placed)
    if not forwards or forwards != stages * microbatches:
        rule = f"must be stages * micro-batches = {stages} * {microbatches}"
        raise UserError(describe_value(str(path), "number of F actions", forwards, rule))
    stage_rank = dict.fromkeys(range(stages), 0)
    stage_rank.update({part.stage: rank for part, rank in reversed(placed)})
    schedule = Schedule.of(path.stem, microbatches, stage_rank.values(), ranks)
    found = check(schedule)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"{path}: is not a complete schedule that can run: {found[0]}{more}")
    return schedule


def _read_line(path: Path, number: int, line: str) -> Iterator[Action]:
    for column, cell in enumerate(line.split(","), start=1):
        text = cell.strip()
        if text:
            try:
                yield parse_action(text)
            except ValueError as error:
                raise UserError(describe_value(str(path), f"line {number}, cell {column}", text, str(error))) from None


def parse_action(text: str) -> Action:
    """The action that prints as `text`; ValueError says what is accepted."""
    if pair := _PAIR.fullmatch(text):
        return overlap(parse_action(pair[1].strip()), parse_action(pair[2].strip()))
    match = _CELL.fullmatch(text)
    kinds = [kind for kind in Kind if kind is not Kind.OVERLAP]
    if not match or match[2] not in kinds or (match[3] == "") != (match[2] in SHARDING):
        raise ValueError(f"must be like 0F1, 1UNSHARD or (0F2;1B0)OVERLAP_F_B; kinds: {', '.join(kinds)}")
    return Action(Kind(match[2]), int(match[1]), int(match[3]) if match[3] else WHOLE_STAGE)

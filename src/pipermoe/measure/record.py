"""What the ranks have measured so far, section by section: a file that a measurement continues where it was cut off."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipermoe.measure.samples import Point
from pipermoe.measure.sizes import Effort, Widths
from pipermoe.specs.base import Frozen
from pipermoe.specs.documents import load, save
from pipermoe.specs.errors import UserError
from pipermoe.specs.precision import Precision
from pipermoe.specs.units import Bytes

RankPoints = dict[str, tuple[Point, ...]]


class Settings(Frozen):
    """What is measured and on what; a record goes on only under the same."""

    ranks: int
    ranks_per_host: int
    device: str
    device_bytes: Bytes
    reserved_bytes: Bytes
    precision: Precision
    widths: Widths
    effort: Effort
    software: dict[str, str]


class Record(Frozen):
    """The points of every rank by section. A section is there whole, of all ranks, or not at all."""

    settings: Settings
    sections: dict[str, tuple[RankPoints, ...]] = {}

    def points_of_ranks(self) -> list[RankPoints]:
        """All points of every rank, by the name of what was measured."""
        ranks: list[RankPoints] = [{} for _ in range(self.settings.ranks)]
        for section in self.sections.values():
            for mine, points in zip(ranks, section, strict=True):
                for key, found in points.items():
                    mine[key] = mine.get(key, ()) + found
        return ranks

    def with_section(self, name: str, per_rank: Sequence[RankPoints]) -> Record:
        return self.model_copy(update={"sections": self.sections | {name: tuple(per_rank)}})


def open_record(path: Path, settings: Settings) -> Record:
    """The record in `path` if it was made under the same settings, else an empty one; says on stderr which."""
    if path.exists():
        try:
            found = load(path, Record)
        except UserError as error:
            print(f"measuring anew: {error}", file=sys.stderr, flush=True)
            return Record(settings=settings)
        if _alike(found.settings, settings):
            print(f"continuing {path}: {len(found.sections)} sections are measured", file=sys.stderr, flush=True)
            return found
        print(f"measuring anew: {path} was measured with other settings", file=sys.stderr, flush=True)
    return Record(settings=settings)


def _alike(one: Settings, other: Settings) -> bool:
    """Equal but for the memory that happens to be free."""
    return one.model_copy(update={"reserved_bytes": other.reserved_bytes}) == other


def keep_section(path: Path, record: Record, name: str, per_rank: Sequence[Any]) -> Record:
    """`record` with a section of plain points (`to_plain`), written whole to `path`."""
    points = [{key: tuple(Point(**point) for point in found) for key, found in rank.items()} for rank in per_rank]
    record = record.with_section(name, points)
    save(path, record)
    return record


def to_plain(points: Mapping[str, Sequence[Point]]) -> dict[str, list[dict[str, Any]]]:
    """Points as JSON writes them."""
    return {key: [asdict(point) for point in found] for key, found in points.items()}

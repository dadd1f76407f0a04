"""Published measurements as they stand in a CSV: one metric of one run a row, the recipe beside it."""

from __future__ import annotations

import csv
from importlib import resources
from pathlib import Path

from pydantic import ValidationError, field_validator

from pipermoe.specs.base import Frozen
from pipermoe.specs.errors import UserError

DEGREES = ("tp", "cp", "ep", "etp", "pp", "vpp", "dp", "mbs", "gbs", "seq")
MAX_CSV_BYTES = 16 * 2**20


class PublishedRow(Frozen):
    """A row of the CSV. An empty degree was not published (None); `metric` says what `value` is."""

    id: str
    source: str
    url: str = ""
    model: str
    gpu: str
    n_gpus: int | None = None
    tp: int | None = None
    cp: int | None = None
    ep: int | None = None
    etp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    dp: int | None = None
    mbs: int | None = None
    gbs: int | None = None
    seq: int | None = None
    precision: str = ""
    recompute: str = ""
    dispatcher: str = ""
    overlap: str = ""
    metric: str
    value: str
    remark: str = ""

    @field_validator("n_gpus", *DEGREES, mode="before")
    @classmethod
    def _empty_is_unknown(cls, value: object) -> object:
        return None if value == "" else value


def published_rows(path: Path | None = None) -> list[PublishedRow]:
    """The rows of a CSV file, by default of the one that comes with the package. Raises `UserError`."""
    if path is None:
        with resources.as_file(resources.files("pipermoe") / "catalogue" / "validation" / "published.csv") as shipped:
            return published_rows(shipped)
    try:
        if path.stat().st_size > MAX_CSV_BYTES:
            raise UserError(f"{path}: is larger than {MAX_CSV_BYTES:,} bytes")
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            return [_row(record, f"{path}: line {reader.line_num}") for record in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from None


def _row(record: dict, where: str) -> PublishedRow:
    try:
        return PublishedRow.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        column = ".".join(map(str, first["loc"]))
        accepted = f"; columns: {', '.join(PublishedRow.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise UserError(f"{where}: {column} = {first['input']!r}: {first['msg'].lower()}{accepted}") from None

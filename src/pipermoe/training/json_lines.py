"""A file of JSON lines, one for each step, that a resumed run goes on in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipermoe.specs.documents import write_atomically
from pipermoe.specs.errors import UserError


class JsonLines:
    """Opened behind the lines of the steps up to `first_step`; those of later ones are dropped. Raises `UserError`."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        write_atomically(path, "".join(_lines_before(path, first_step)))
        try:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None

    def write(self, values: Mapping[str, Any]) -> None:
        """One line, of which "step" is one value."""
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        self._file.close()


def _lines_before(path: Path, first_step: int) -> Iterator[str]:
    """The lines of steps that a resumed run does not repeat; none for a new run."""
    if first_step == 0 or not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if step <= first_step:
            yield line

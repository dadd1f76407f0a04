"""Text files cut into parts of about equal size, for workers to read apart: plain text, and JSON lines.

A plain text file is one document. A line of a `.jsonl` file is one document: an object with the text in one field.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipermoe.data.corpus import files_below
from pipermoe.specs.errors import UserError

PIECE_CHARACTERS = 2**22  # of a long text, held in memory at once
LINE_LIMIT = 2**28  # bytes; a longer line of JSON is not a document but a mistake
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes start .. stop - 1 of a file: all of a plain text, the lines that begin in there of a JSON-lines file.

    `named` by the user: then unreadable text is an error, while in a folder it is skipped.
    """

    path: Path
    start: int
    stop: int
    named: bool

    @property
    def size(self) -> int:
        return self.stop - self.start


def cut_sources(paths: Iterable[Path], part_bytes: int) -> list[tuple[Part, ...]]:
    """The files of `paths` (folders: all below them, by name) in groups of up to about `part_bytes`.

    Only JSON-lines files are cut. The groups depend on the files alone. Raises `UserError` for a path that is missing.
    """
    groups: list[tuple[Part, ...]] = []
    group: list[Part] = []
    for part in (part for path in paths for part in _parts(path, part_bytes)):
        if group and sum(other.size for other in group) + part.size > part_bytes:
            groups.append(tuple(group))
            group = []
        group.append(part)
    return [*groups, tuple(group)] if group else groups


def _parts(path: Path, part_bytes: int) -> Iterator[Part]:
    try:
        named, files = (False, list(files_below(path))) if path.is_dir() else (True, [path])
        sizes = [file.stat().st_size for file in files]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; name existing text files or folders") from None
    for file, size in zip(files, sizes, strict=True):
        step = part_bytes if file.suffix in JSON_LINES else max(size, 1)
        for start in range(0, size, step):
            yield Part(file, start, min(start + step, size), named)


def read_documents(part: Part, json_field: str) -> Iterator[Iterable[str]]:
    """The documents of a part, each as the pieces of its text; blank ones are left out.

    In a folder, a plain file that is not UTF-8 text holds no document. Raises `UserError` naming file and line for
    everything else that is none.
    """
    if part.path.suffix in JSON_LINES:
        yield from ([text] for text in _json_texts(part, json_field) if text and not text.isspace())
    elif _holds_text(part):
        yield _text_pieces(part.path)


def _holds_text(part: Part) -> bool:
    """Whether all of a plain file is text and some of it not blank: asked before any of it is written."""
    try:
        blank = True
        for piece in _text_pieces(part.path):
            if "\0" in piece and not part.named:
                return False
            blank = blank and (not piece or piece.isspace())
    except (UnicodeDecodeError, OSError) as error:
        if not part.named:
            return False
        why = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error.strerror}"
        raise UserError(f"{part.path}: {why}") from None
    return not blank


def _text_pieces(path: Path) -> Iterator[str]:
    """The text in pieces that end at ends of lines, where there are any."""
    with open(path, encoding="utf-8") as file:
        rest = ""
        while text := file.read(PIECE_CHARACTERS):
            text = rest + text
            cut = text.rfind("\n") + 1 or len(text)
            rest = text[cut:]
            yield text[:cut]
        yield rest


def _json_texts(part: Part, field: str) -> Iterator[str]:
    try:
        with open(part.path, "rb") as file:
            position = part.start
            if position:  # the line that begins before this part belongs to the part before
                file.seek(position - 1)
                position += len(file.readline()) - 1
            while position < part.stop and (line := file.readline(LINE_LIMIT + 1)):
                if len(line) > LINE_LIMIT:
                    raise _bad_line(part, position, f"is longer than {LINE_LIMIT:,} bytes")
                if not line.isspace():
                    yield _text_of(line, field, part, position)
                position += len(line)
    except OSError as error:
        raise UserError(f"{part.path}: cannot be read: {error.strerror}") from None


def _text_of(line: bytes, field: str, part: Part, position: int) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad_line(part, position, f"is not valid JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(text := document.get(field), str):
        fields = [name for name, value in document.items() if isinstance(value, str)] if type(document) is dict else []
        found = f"its texts are {', '.join(fields)}" if fields else "it holds no text"
        raise _bad_line(part, position, f"has no text field {field!r}; {found}; name one with --json-field")
    if "\\ud" in line.decode(errors="replace").lower():  # a surrogate without its other half is no character
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _bad_line(part: Part, position: int, rule: str) -> UserError:
    with open(part.path, "rb") as file:
        number, left = 1, position
        while left and (block := file.read(min(left, 2**20))):
            number += block.count(b"\n")
            left -= len(block)
    return UserError(f"{part.path}: line {number}: {rule}")

"""Reading and writing the project's files: TOML for what people edit, JSON for results.

Every document is validated at the door; an error names the file, the key, the value and what would be accepted.
Writing is atomic: a document is either whole or not there.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from pipermoe.specs.errors import UserError, describe_value

MAX_DOCUMENT_BYTES = 16 * 2**20  # a plan or platform is a few KiB; a larger file is a mistake, not a document
SCHEMA_VERSION = 1

Document = TypeVar("Document", bound=BaseModel)


def load(path: str | Path, kind: type[Document], overrides: Mapping[str, Any] | None = None) -> Document:
    """The document of type `kind` in `path` (TOML or JSON by suffix), with the top-level `overrides` on top.

    Raises `UserError`, never anything else.
    """
    return validate(load_mapping(path) | dict(overrides or {}), kind, where=str(path))


def load_mapping(path: str | Path) -> dict[str, Any]:
    """The table of a TOML or JSON file in this version's schema, without `schema_version`. Raises `UserError`."""
    data = read_mapping(path)
    version = data.pop("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION or isinstance(version, bool):
        rule = f"this version of pipermoe reads schema_version = {SCHEMA_VERSION}"
        raise UserError(describe_value(str(path), "schema_version", version, rule))
    return data


def read_mapping(path: str | Path, limit_bytes: int = MAX_DOCUMENT_BYTES) -> dict[str, Any]:
    """The top-level table of a TOML or JSON file, unvalidated. Raises `UserError` for anything that is not one."""
    path = Path(path)
    text = read_text(path, limit_bytes)
    try:
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        language = "JSON" if path.suffix == ".json" else "TOML"
        raise UserError(f"{path}: is not valid {language}: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: must hold one table of keys and values, not a {type(data).__name__}")
    return data


def read_text(path: Path, limit_bytes: int = MAX_DOCUMENT_BYTES) -> str:
    """The text of a file of at most `limit_bytes` that a user has named. Raises `UserError` where it is none."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UserError(f"{path}: is not a file")
        if size > limit_bytes:
            raise UserError(f"{path}: is {size:,} bytes; a document of at most {limit_bytes:,} bytes is expected")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def validate(data: dict[str, Any], kind: type[Document], where: str) -> Document:
    """`data` as a `kind`; `where` names the file in errors."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        # A misspelt key is said before the key that is missing because of it.
        first, *others = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(_explain(first, kind, where) + more) from None


def save(path: str | Path, document: BaseModel, header: str = "") -> Path:
    """Write `document` atomically as TOML or JSON by suffix; `header` becomes comment lines on top of a TOML file."""
    path = Path(path)
    if path.suffix == ".json":
        text = to_json(document) + "\n"
    else:
        comment = "".join(f"# {line}\n" for line in header.splitlines()) + ("\n" if header else "")
        text = comment + to_toml(document)
    write_atomically(path, text)
    return path


def to_toml(document: BaseModel) -> str:
    """The document as it stands in a TOML file, `schema_version` first."""
    return tomli_w.dumps(_with_version(document))


def to_json(document: BaseModel) -> str:
    """The document as it stands in a JSON file, `schema_version` first; what `--json` prints."""
    return json.dumps(_with_version(document), indent=2, ensure_ascii=False)


def _with_version(document: BaseModel) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION} | document.model_dump(mode="json", exclude_none=True)


def require_writable(path: str | Path) -> None:
    """UserError unless `path` can be written: asked before long work, so that its result is not lost at the end."""
    folder = Path(path).parent
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if Path(path).is_dir() or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{path}: cannot be written; name a file in a folder that can be")


def write_atomically(path: Path, text: str) -> None:
    """Write through a temporary file in the same folder, so that a reader never sees half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def write_files(folder: Path, files: Mapping[str, str]) -> list[Path]:
    """Write texts by file name into `folder`, each atomically; a text that starts with #! may be executed."""
    paths = []
    for name, text in files.items():
        paths.append(folder / name)
        write_atomically(paths[-1], text)
        if text.startswith("#!"):
            paths[-1].chmod(0o755)
    return paths


def _explain(error: Any, kind: type[BaseModel], where: str) -> str:
    """One pydantic error as one line that a user can act on."""
    location = [part for part in error["loc"] if not _is_union_tag(part)]
    key = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        accepted = _accepted_keys(kind, error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), accepted, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return describe_value(where, key, error["input"], f"unknown key; {hint}accepted: {', '.join(accepted)}")
    if error["type"] == "missing":
        return describe_value(where, "", None, f"{key}: required key is missing")
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[0].lower() + message[1:]
    return describe_value(where, key, _short(error["input"]), message) if key else f"{where}: {message}"


def _short(value: object) -> object:
    return value if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."


def _is_union_tag(part: object) -> bool:
    return isinstance(part, str) and part.startswith(("function-", "tagged-union"))


def _accepted_keys(kind: Any, location: tuple[int | str, ...]) -> list[str]:
    """The keys that the record at `location` inside `kind` accepts."""
    records = [kind]
    for part in location:
        nested = []
        for record in records:
            field = record.model_fields.get(part) if isinstance(part, str) else None
            if field is not None:
                nested += _records_in(field.annotation)
        records = nested or records
    return sorted({name for record in records for name in record.model_fields})


def _records_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [record for argument in typing.get_args(annotation) for record in _records_in(argument)]

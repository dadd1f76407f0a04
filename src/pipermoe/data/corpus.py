"""The text that is trained on: files that the user names, or the Python standard library's sources and docstrings.

The order of documents depends on their names alone, so that every rank, seed and arrangement reads the same stream.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipermoe.specs.errors import UserError

STANDARD_LIBRARY = "the Python standard library"
# Third-party packages are not the same on every machine; tests and generated tables are poor text.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}


@dataclass(frozen=True, slots=True)
class Document:
    """One file of text; `name` is its path below the folder it was found in, with forward slashes."""

    name: str
    text: str


def read_corpus(paths: tuple[str, ...]) -> list[Document]:
    """All documents below `paths` (files or folders; none: the standard library), shuffled by a hash of their names.

    Files that are not UTF-8 text are skipped in folders and an error when named. Raises `UserError` for a path that is
    missing, unreadable or holds no text.
    """
    if not paths:
        documents = list(_standard_library())
        if not documents:
            raise UserError("data.paths = []: this Python ships no sources of its standard library; name text files")
    else:
        documents = [document for path in paths for document in _named(Path(path))]
    return sorted(documents, key=lambda document: (hashlib.sha256(document.name.encode()).digest(), document.text))


def describe_source(paths: tuple[str, ...]) -> str:
    return ", ".join(paths) or STANDARD_LIBRARY


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in files_below(root, SKIPPED_FOLDERS):
        if path.suffix == ".py":
            yield from _read(path, root)


def _named(path: Path) -> list[Document]:
    """The documents of one path that the user named."""
    key = f"data.paths: {path}"
    try:
        path.stat()
    except OSError as error:
        raise UserError(f"{key}: {error.strerror or error}; name an existing text file or folder") from None
    if path.is_dir():
        documents = [document for file in files_below(path) for document in _read(file, path)]
        if not documents:
            raise UserError(f"{key}: the folder holds no readable UTF-8 text")
        return documents
    if not path.is_file():
        raise UserError(f"{key}: is neither a file nor a folder")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{key}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{key}: the file is empty")
    return [Document(path.name, text)]


def files_below(root: Path, skipped: Collection[str] = ()) -> Iterator[Path]:
    """All regular files below `root` by name; hidden files, hidden folders and folders named in `skipped` left out."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in skipped and not name.startswith("."))
        yield from (
            path for name in sorted(names) if not name.startswith(".") and (path := Path(folder, name)).is_file()
        )


def _read(path: Path, root: Path) -> Iterator[Document]:
    """The document in `path`, or nothing where it cannot be read, is not UTF-8 text or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if text.strip() and "\0" not in text:
        yield Document(path.relative_to(root).as_posix(), text)

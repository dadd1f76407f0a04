"""Prepared tokens on disk: what `pipermoe tokenize` writes and a job memory-maps.

    tokens.json          the header: type of a token, vocabulary, tokenizer, length of every shard
    00000.tokens         token numbers, little-endian, nothing else
    00000.documents      where each document begins in the shard, and its length: uint64, little-endian
    00001.tokens ...

A shard holds whole documents. The header is written last: a folder that has one is whole.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipermoe.data.stream import Documents
from pipermoe.data.tokenizer import token_type
from pipermoe.specs.base import Frozen
from pipermoe.specs.documents import load
from pipermoe.specs.errors import UserError

HEADER = "tokens.json"
INDEX_TYPE = np.dtype("<u8")


class ShardLength(Frozen):
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)


class TokenHeader(Frozen):
    """What a folder of prepared tokens holds. `tokenizer_sha256` is "bytes" for the built-in tokenizer."""

    vocab_size: int = Field(ge=1)
    end_of_text: int | None = None
    tokenizer: str
    tokenizer_sha256: str
    shards: tuple[ShardLength, ...]

    @property
    def token_type(self) -> np.dtype[np.unsignedinteger]:
        return token_type(self.vocab_size)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


def is_prepared(path: Path) -> bool:
    return (path / HEADER).is_file()


def open_shards(folder: Path) -> tuple[TokenHeader, list[Documents]]:
    """The header and the memory-mapped shards of `folder`. Raises `UserError` naming a file that is damaged."""
    header = load(folder / HEADER, TokenHeader)
    return header, [_open_shard(folder, i, length, header) for i, length in enumerate(header.shards) if length.tokens]


def shard_files(folder: Path, number: int) -> tuple[Path, Path]:
    """The tokens and the index of a shard."""
    return folder / f"{number:05d}.tokens", folder / f"{number:05d}.documents"


def write_shard(
    folder: Path,
    number: int,
    documents: Iterable[Iterable[NDArray[np.unsignedinteger]]],
    vocab_size: int,
    end_of_text: int | None,
) -> None:
    """Write documents, each a series of pieces, one piece in memory at a time; the files appear when they are whole.

    Raises `UserError` where they cannot be written.
    """
    finals = shard_files(folder, number)
    tokens, index = (path.with_name(f".{path.name}") for path in finals)
    try:
        starts = _write_tokens(tokens, documents, token_type(vocab_size), end_of_text)
        with open(index, "wb") as file:
            file.write(np.array(starts, INDEX_TYPE).tobytes())
            _flush(file)
        index.replace(finals[1])  # the tokens last: a shard that has them is whole
        tokens.replace(finals[0])
    except OSError as error:
        raise UserError(f"{finals[0]}: cannot be written: {error.strerror}") from None


def _write_tokens(
    path: Path, documents: Iterable[Iterable[NDArray[np.unsignedinteger]]], kind: np.dtype, end_of_text: int | None
) -> array:
    """Write the tokens; where each document begins, and their number."""
    end = b"" if end_of_text is None else np.array([end_of_text], kind).tobytes()
    starts, length = array("Q", [0]), 0
    with open(path, "wb") as file:
        for pieces in documents:
            for piece in pieces:
                length += len(piece)
                file.write(piece.astype(kind, copy=False).tobytes())
            length += len(end) // kind.itemsize
            file.write(end)
            if length > starts[-1]:
                starts.append(length)
        _flush(file)
    return starts


def shard_length(folder: Path, number: int, vocab_size: int) -> ShardLength | None:
    """How long a shard is that lies there whole; None if it does not."""
    tokens, index = shard_files(folder, number)
    if not tokens.is_file() or not index.is_file():
        return None
    count = tokens.stat().st_size // token_type(vocab_size).itemsize
    return ShardLength(tokens=count, documents=index.stat().st_size // INDEX_TYPE.itemsize - 1)


def _open_shard(folder: Path, number: int, length: ShardLength, header: TokenHeader) -> Documents:
    tokens_file, index_file = shard_files(folder, number)
    tokens = _map(tokens_file, header.token_type, length.tokens)
    starts = _map(index_file, INDEX_TYPE, length.documents + 1)
    if starts[0] != 0 or starts[-1] != length.tokens or (np.diff(starts.view("<i8")) <= 0).any():
        raise UserError(f"{index_file}: is not an index of {length.tokens:,} tokens; prepare the text again")
    return Documents(str(tokens_file), tokens, starts, header.vocab_size)


def _map(path: Path, kind: np.dtype, count: int) -> NDArray:
    try:
        size = path.stat().st_size
        if size == count * kind.itemsize:
            return np.memmap(path, kind, mode="r")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; prepare the text again") from None
    raise UserError(f"{path}: is {size:,} bytes instead of {count * kind.itemsize:,}; prepare the text again")


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())

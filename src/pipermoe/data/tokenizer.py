"""Text to token numbers: bytes, built in, or a vocabulary in a `tokenizers` JSON file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.errors import UserError, describe_value

END_OF_TEXT_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]")


class Tokenizer(Protocol):
    """What the data pipeline needs: how many token numbers there are, which ends a document, and those of a text.

    `fingerprint` is equal for tokenizers that give every text the same numbers.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        """The text's tokens in the smallest type that holds the vocabulary; shape [tokens]."""
        ...


def token_type(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned little-endian type that holds every number below `vocab_size`."""
    return np.dtype("<u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """Every byte of the UTF-8 text is a token; byte 0, which text does not hold, ends a document."""

    vocab_size: int = 256
    end_of_text: int = 0
    fingerprint: str = "bytes"

    def encode(self, text: str) -> NDArray[np.uint8]:
        return np.frombuffer(text.encode(), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class VocabularyTokenizer:
    """A vocabulary read by the `tokenizers` package."""

    vocabulary: Any
    vocab_size: int
    end_of_text: int | None
    fingerprint: str

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        return np.array(self.vocabulary.encode(text, add_special_tokens=False).ids, dtype=token_type(self.vocab_size))


def load_tokenizer(name: str, key: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer `name`: "bytes" or the path of a `tokenizers` JSON file. Raises `UserError`, which names `key`."""
    return ByteTokenizer() if name == "bytes" else _load_vocabulary(Path(name), f"{key} = {name!r}")


def check_vocabulary(tokenizer_vocab_size: int, model_vocab_size: int, key: str, name: str) -> None:
    """Raise `UserError` where a tokenizer has token numbers that the model lacks."""
    if tokenizer_vocab_size > model_vocab_size:
        rule = f"has {tokenizer_vocab_size:,} tokens; the model's vocab_size is only {model_vocab_size:,}"
        raise UserError(describe_value("", key, name, rule))


def _load_vocabulary(path: Path, key: str) -> VocabularyTokenizer:
    if not path.is_file():
        raise UserError(f'{key}: no such file; accepted: "bytes" or the path of a tokenizer.json')
    try:
        from tokenizers import Tokenizer as Vocabulary
    except ImportError:
        raise UserError(f"{key}: needs the package tokenizers: pip install 'pipermoe[tokenizers]'") from None
    try:
        vocabulary = Vocabulary.from_file(str(path))
    except Exception as error:  # the package raises the bare Exception for everything that is wrong with a file
        raise UserError(f"{key}: is not a tokenizers JSON file: {error}") from None
    ends = (vocabulary.token_to_id(token) for token in END_OF_TEXT_TOKENS)
    return VocabularyTokenizer(
        vocabulary,
        vocab_size=1 + max(vocabulary.get_vocab(with_added_tokens=True).values(), default=-1),
        end_of_text=next((token for token in ends if token is not None), None),
        fingerprint=hashlib.sha256(path.read_bytes()).hexdigest(),
    )

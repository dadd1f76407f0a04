"""Text to token numbers: bytes, built in, or a vocabulary in a `tokenizers` JSON file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.errors import UserError, describe_value

END_OF_TEXT_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]")


class Tokenizer(Protocol):
    """What the data pipeline needs: how many token numbers there are, and the numbers of one document."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> NDArray[np.integer]:
        """The document's tokens and, where the vocabulary has one, the token that ends it; shape [tokens]."""
        ...


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """Every byte of the UTF-8 text is a token; byte 0, which text does not hold, ends a document."""

    vocab_size: int = 256

    def encode(self, text: str) -> NDArray[np.uint8]:
        return np.frombuffer(text.encode() + b"\0", dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class VocabularyTokenizer:
    """A vocabulary read by the `tokenizers` package."""

    vocabulary: Any
    end_of_text: int | None

    @property
    def vocab_size(self) -> int:
        return 1 + max(self.vocabulary.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str) -> NDArray[np.int32]:
        tokens = self.vocabulary.encode(text, add_special_tokens=False).ids
        return np.array(tokens if self.end_of_text is None else [*tokens, self.end_of_text], dtype=np.int32)


def load_tokenizer(name: str, vocab_size: int) -> Tokenizer:
    """The tokenizer `name` ("bytes" or the path of a `tokenizers` JSON file) for a model of `vocab_size` tokens.

    Raises `UserError` where it cannot be loaded or has token numbers that the model lacks.
    """
    tokenizer = ByteTokenizer() if name == "bytes" else _load_vocabulary(Path(name))
    if tokenizer.vocab_size > vocab_size:
        rule = f"has {tokenizer.vocab_size:,} tokens; the model's vocab_size is only {vocab_size:,}"
        raise UserError(describe_value("", "data.tokenizer", name, rule))
    return tokenizer


def _load_vocabulary(path: Path) -> VocabularyTokenizer:
    key = f"data.tokenizer = {str(path)!r}"
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
    return VocabularyTokenizer(vocabulary, next((token for token in ends if token is not None), None))

"""Documents as one stream of tokens, cut into sequences: what is held back, and where sequences begin."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.errors import UserError
from pipermoe.specs.train import Packing


@dataclass(frozen=True)
class Documents:
    """Whole documents, one after the other: document d is `tokens[starts[d] : starts[d + 1]]`.

    `tokens` are unsigned numbers below `vocab_size` [tokens], perhaps a memory map; `starts` [documents + 1] begins
    with 0 and ends with their number. `name` is what errors call them.
    """

    name: str
    tokens: NDArray[np.unsignedinteger]
    starts: NDArray[np.unsignedinteger]
    vocab_size: int

    def split(self, held_back: float) -> tuple[Documents, Documents]:
        """All but the last documents, and those: the fewest that hold the fraction `held_back` of the tokens.

        Where that would be all of them, the first is cut in two.
        """
        wanted = round(len(self.tokens) * (1 - held_back))
        first = int(np.searchsorted(self.starts, wanted, side="right")) - 1
        cut = int(self.starts[first]) if first else wanted
        ends = self.starts[self.starts >= cut] - self.starts.dtype.type(cut)
        head = np.append(self.starts[self.starts < cut], self.starts.dtype.type(cut))
        tail = ends if first else np.insert(ends, 0, 0)
        return self._part(self.tokens[:cut], head), self._part(self.tokens[cut:], tail)

    def _part(self, tokens: NDArray[np.unsignedinteger], starts: NDArray[np.unsignedinteger]) -> Documents:
        return Documents(self.name, tokens, starts, self.vocab_size)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        tokens = self.tokens[start:stop].astype(np.int64)
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            raise UserError(
                f"{self.name}: holds the token {tokens.max()}, the vocabulary ends at {self.vocab_size - 1}; "
                "the file is damaged: prepare it again"
            )
        return tokens


@dataclass(frozen=True)
class Stream:
    """Shards of documents read as one."""

    shards: tuple[Documents, ...]

    @cached_property
    def ends(self) -> list[int]:
        """Where each shard ends in the stream."""
        return list(accumulate(len(shard.tokens) for shard in self.shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """The tokens start .. start + count - 1."""
        pieces, stop = [], start + count
        for i in range(bisect_right(self.ends, start), len(self.shards)):
            before = self.ends[i] - len(self.shards[i].tokens)
            if before >= stop:
                break
            pieces.append(self.shards[i].read(max(start - before, 0), stop - before))
        return np.concatenate(pieces)

    def document_starts(self) -> NDArray[np.int64]:
        """Where every document begins, and the length of the stream."""
        befores = [end - len(shard.tokens) for end, shard in zip(self.ends, self.shards, strict=True)]
        starts = [shard.starts[:-1].astype(np.int64) + at for at, shard in zip(befores, self.shards, strict=True)]
        return np.concatenate([*starts, [len(self)]])


@dataclass(frozen=True)
class Sequences:
    """Sequences of `seq_len` tokens, each with one more as the target of its last; `starts` says where they begin."""

    stream: Stream
    starts: NDArray[np.int64] | range
    seq_len: int

    @classmethod
    def pack(cls, stream: Stream, seq_len: int, packing: Packing) -> Sequences:
        if packing == "documents":
            return cls(stream, aligned_starts(stream.document_starts().tolist(), seq_len), seq_len)
        return cls(stream, range(0, len(stream) - seq_len, seq_len), seq_len)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, numbers: NDArray[np.integer]) -> NDArray[np.int64]:
        """The sequences of these numbers (any shape): int64 [*numbers.shape, seq_len + 1]."""
        rows = [self.stream.read(int(self.starts[number]), self.seq_len + 1) for number in numbers.flat]
        return np.stack(rows).reshape(*numbers.shape, -1)


def aligned_starts(document_starts: Sequence[int], seq_len: int) -> NDArray[np.int64]:
    """Where sequences begin so that none begins inside a document that began in the one before.

    A sequence that ends inside a document which it began is followed by one that begins with this document: a document
    of at most `seq_len` tokens is whole in some sequence, a longer one is cut only every `seq_len` tokens from its
    start. No padding; the price is that the tokens of such tails are seen twice. `document_starts` ends with the length
    of the stream.
    """
    starts, at, length = [], 0, document_starts[-1]
    while at + seq_len < length:
        starts.append(at)
        last = document_starts[bisect_right(document_starts, at + seq_len) - 1]  # the document that the cut falls into
        at = last if last > at else at + seq_len
    return np.array(starts, dtype=np.int64)

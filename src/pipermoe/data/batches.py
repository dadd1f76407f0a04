"""Which sequences every step, data-parallel rank and micro-batch sees: a pure function of seed and step.

The global batch of a step is one list of sequences, cut into consecutive micro-batches; data-parallel rank r computes
consecutive ones. So every arrangement with the same micro-batch size sees the same micro-batches, a one-process run
too, and a run resumes exactly from its step number alone.
"""

# B sequences of a global batch, M micro-batches of one data-parallel rank, b sequences of a micro-batch

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipermoe.data.corpus import describe_source, read_corpus
from pipermoe.data.shards import HEADER, is_prepared, open_shards
from pipermoe.data.stream import Documents, Sequences, Stream
from pipermoe.data.tokenizer import check_vocabulary, load_tokenizer, token_type
from pipermoe.specs.errors import UserError
from pipermoe.specs.train import Data, TrainConfig

FINGERPRINT_SEQUENCES = 64


@dataclass(frozen=True)
class TextData:
    """Training and validation sequences of one job."""

    train: Sequences
    validation: Sequences
    global_batch_size: int
    validation_batches: int
    seed: int
    source: str = ""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of how many sequences each part has, and of the tokens of 64 of them, evenly spread.

        Another text, tokenizer, packing or division has another one, wherever the files lie; of a text that was changed
        in a few places only, it need not.
        """
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            chosen = np.linspace(0, len(part) - 1, FINGERPRINT_SEQUENCES).astype(np.int64)
            digest.update(len(part).to_bytes(8, "little") + part[chosen].astype("<i8").tobytes())
        return digest.hexdigest()

    def training_numbers(self, step: int) -> NDArray[np.integer]:
        """The sequences of `step` (from 0) [B]. Every epoch visits every sequence once, in a new order."""
        numbers = step * self.global_batch_size + np.arange(self.global_batch_size)
        epochs, positions = np.divmod(numbers, len(self.train))
        return np.array(
            [
                epoch_order(self.seed, int(epoch), len(self.train))[position]
                for epoch, position in zip(epochs, positions, strict=True)
            ]
        )

    def validation_numbers(self, index: int) -> NDArray[np.integer]:
        """The sequences of the held-back batch `index`, 0 <= index < `validation_batches` [B], the same in every run.

        The batches are spread evenly over the held-back text: consecutive ones would be a few pages of one document.
        """
        spacing = len(self.validation) // (self.validation_batches * self.global_batch_size)
        return (index * self.global_batch_size + np.arange(self.global_batch_size)) * spacing


@lru_cache(maxsize=2)  # a batch spans at most two epochs
def epoch_order(seed: int, epoch: int, sequences: int) -> NDArray[np.integer]:
    """The order in which `epoch` visits the training sequences: a permutation of range(sequences)."""
    return np.random.default_rng([seed, epoch]).permutation(sequences)


def load_text(train: TrainConfig, vocab_size: int) -> TextData:
    """Open the prepared tokens of a job, or read and tokenize its text, and split them.

    Of every shard the last documents are held back, the fewest that hold `validation_fraction` of its tokens; text
    that is read here is one shard. There are up to `train.validation_batches` validation batches, fewer where the text
    is short. Raises `UserError` where it has too few tokens for one training and one validation batch.
    """
    data = train.data
    folders = [Path(path) for path in data.paths]
    prepared = [folder for folder in folders if is_prepared(folder)]
    if prepared and prepared != folders:
        plain = next(folder for folder in folders if folder not in prepared)
        raise UserError(f"data.paths: {plain}: is not prepared, {prepared[0]} is; prepare all of it or none")
    shards = _open_prepared(prepared, vocab_size) if prepared else [_encode_text(data, vocab_size)]
    parts = [shard.split(data.validation_fraction) for shard in shards]
    streams = (Stream(part) for part in zip(*parts, strict=True))
    training, validation = (Sequences.pack(stream, train.seq_len, data.packing) for stream in streams)
    source = describe_source(data.paths)
    for sequences, purpose in ((training, "training"), (validation, "validation")):
        if len(sequences) < train.global_batch_size:
            raise UserError(
                f"data.paths: {source}: {len(sequences.stream):,} tokens for {purpose} are too few for one global "
                f"batch of {train.global_batch_size} sequences of {train.seq_len} tokens "
                f"(validation_fraction = {data.validation_fraction}); name more text or use a smaller batch"
            )
    return TextData(
        train=training,
        validation=validation,
        global_batch_size=train.global_batch_size,
        validation_batches=min(train.validation_batches, len(validation) // train.global_batch_size),
        seed=train.seed,
        source=source,
    )


def _open_prepared(folders: list[Path], vocab_size: int) -> list[Documents]:
    opened = [open_shards(folder) for folder in folders]
    first = opened[0][0]
    for folder, (header, _) in zip(folders, opened, strict=True):
        check_vocabulary(header.vocab_size, vocab_size, f"{folder / HEADER}: tokenizer", header.tokenizer)
        if header.tokenizer_sha256 != first.tokenizer_sha256:
            raise UserError(
                f"data.paths: {folder} was prepared with the tokenizer {header.tokenizer!r}, {folders[0]} with another "
                f"one, {first.tokenizer!r}; prepare them with the same"
            )
    return [shard for _, shards in opened for shard in shards]


def _encode_text(data: Data, vocab_size: int) -> Documents:
    """The text of the job, tokenized in memory."""
    tokenizer = load_tokenizer(data.tokenizer)
    check_vocabulary(tokenizer.vocab_size, vocab_size, "data.tokenizer", data.tokenizer)
    kind = token_type(tokenizer.vocab_size)
    end = np.array([] if tokenizer.end_of_text is None else [tokenizer.end_of_text], kind)
    encoded = [np.append(tokenizer.encode(document.text), end) for document in read_corpus(data.paths)]
    starts = np.cumsum([0, *map(len, encoded)]).astype(np.uint64)
    return Documents(describe_source(data.paths), np.concatenate(encoded), starts, tokenizer.vocab_size)


def micro_batches(
    numbers_B: NDArray[np.integer], data_parallel: int, dp_rank: int, micro_batch_size: int
) -> NDArray[np.integer]:
    """The sequences of data-parallel rank `dp_rank` in a global batch: [M, b], M = B / (data_parallel * b)."""
    if len(numbers_B) % (data_parallel * micro_batch_size):
        raise UserError(
            f"train.global_batch_size = {len(numbers_B)}: must be a multiple of data_parallel * micro_batch_size = "
            f"{data_parallel} * {micro_batch_size}"
        )
    return numbers_B.reshape(data_parallel, -1, micro_batch_size)[dp_rank]

"""Which sequences every step, data-parallel rank and micro-batch sees: a pure function of seed and step.

The global batch of a step is one list of sequences, cut into consecutive micro-batches; data-parallel rank r computes
consecutive ones. So every arrangement with the same micro-batch size sees the same micro-batches, a one-process run
too, and a run resumes exactly from its step number alone.
"""

# B sequences of a global batch, M micro-batches of one data-parallel rank, b sequences of a micro-batch,
# S tokens of a sequence, C = S + 1 tokens of a sequence and the target of its last

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipermoe.runtime.data.corpus import describe_source, read_corpus
from pipermoe.runtime.data.tokenizer import load_tokenizer
from pipermoe.specs.errors import UserError
from pipermoe.specs.train import TrainConfig


@dataclass(frozen=True)
class Blocks:
    """A token stream cut into sequences of `seq_len` tokens, each read with one more as the last one's target."""

    tokens: NDArray[np.integer]
    seq_len: int

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.seq_len)

    def __getitem__(self, blocks: NDArray[np.integer]) -> NDArray[np.int64]:
        """The sequences numbered `blocks` (any shape): int64 [*blocks.shape, seq_len + 1]."""
        offsets = np.asarray(blocks)[..., None] * self.seq_len + np.arange(self.seq_len + 1)
        return self.tokens[offsets].astype(np.int64)


@dataclass(frozen=True)
class TextData:
    """Training and validation sequences of one job."""

    train: Blocks
    validation: Blocks
    global_batch_size: int
    validation_batches: int
    seed: int
    source: str = ""

    def batch(self, step: int) -> NDArray[np.int64]:
        """The global batch of `step` (from 0): int64 [B, C]. Every epoch visits every sequence once in a new order."""
        numbers = step * self.global_batch_size + np.arange(self.global_batch_size)
        epochs, positions = np.divmod(numbers, len(self.train))
        chosen = [
            epoch_order(self.seed, int(epoch), len(self.train))[position]
            for epoch, position in zip(epochs, positions, strict=True)
        ]
        return self.train[np.array(chosen)]

    def validation_batch(self, index: int) -> NDArray[np.int64]:
        """The held-back batch `index`, 0 <= index < `validation_batches`: int64 [B, C], the same in every run.

        The batches are spread evenly over the held-back text: consecutive ones would be a few pages of one document.
        """
        spacing = len(self.validation) // (self.validation_batches * self.global_batch_size)
        return self.validation[(index * self.global_batch_size + np.arange(self.global_batch_size)) * spacing]


@lru_cache(maxsize=2)  # a batch spans at most two epochs
def epoch_order(seed: int, epoch: int, sequences: int) -> NDArray[np.integer]:
    """The order in which `epoch` visits the training sequences: a permutation of range(sequences)."""
    return np.random.default_rng([seed, epoch]).permutation(sequences)


def load_text(train: TrainConfig, vocab_size: int) -> TextData:
    """Read, tokenize and split the text of a job.

    The last `validation_fraction` of the stream of whole documents is held back. There are up to
    `train.validation_batches` validation batches, fewer where the text is short. Raises `UserError` where it has too
    few tokens for one training and one validation batch.
    """
    tokenizer = load_tokenizer(train.data.tokenizer, vocab_size)
    stream = np.concatenate([tokenizer.encode(document.text) for document in read_corpus(train.data.paths)])
    held_back = round(len(stream) * train.data.validation_fraction)
    training = Blocks(stream[: len(stream) - held_back], train.seq_len)
    validation = Blocks(stream[len(stream) - held_back :], train.seq_len)
    source = describe_source(train.data.paths)
    for blocks, purpose in ((training, "training"), (validation, "validation")):
        if len(blocks) < train.global_batch_size:
            raise UserError(
                f"data.paths: {source}: {len(blocks.tokens):,} tokens for {purpose} are too few for one global batch "
                f"of {train.global_batch_size} sequences of {train.seq_len} tokens "
                f"(validation_fraction = {train.data.validation_fraction}); name more text or use a smaller batch"
            )
    return TextData(
        train=training,
        validation=validation,
        global_batch_size=train.global_batch_size,
        validation_batches=min(train.validation_batches, len(validation) // train.global_batch_size),
        seed=train.seed,
        source=source,
    )


def micro_batches(
    batch_BC: NDArray[np.int64], data_parallel: int, dp_rank: int, micro_batch_size: int
) -> NDArray[np.int64]:
    """The share of data-parallel rank `dp_rank` in a global batch: int64 [M, b, C], M = B / (data_parallel * b)."""
    sequences, width = batch_BC.shape
    if sequences % (data_parallel * micro_batch_size):
        raise UserError(
            f"train.global_batch_size = {sequences}: must be a multiple of data_parallel * micro_batch_size = "
            f"{data_parallel} * {micro_batch_size}"
        )
    return batch_BC.reshape(data_parallel, -1, micro_batch_size, width)[dp_rank]

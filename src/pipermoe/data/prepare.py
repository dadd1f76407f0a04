"""Text to prepared tokens: the sources are cut into parts, and workers write one shard for each.

The parts depend on the sources alone, so any number of workers writes the same bytes, and a preparation that was
stopped goes on with the shards that are missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipermoe.data.shards import HEADER, TokenHeader, shard_length, write_shard
from pipermoe.data.sources import Part, cut_sources, read_documents
from pipermoe.data.tokenizer import Tokenizer, load_tokenizer
from pipermoe.processes.local_ranks import run_local_ranks
from pipermoe.processes.output_folder import lock_folder
from pipermoe.processes.progress import Display
from pipermoe.specs.base import Frozen
from pipermoe.specs.documents import load, save
from pipermoe.specs.errors import UserError
from pipermoe.specs.units import MIB

SHARD_BYTES = 2**26  # of text
UNFINISHED = "unfinished.json"


class Recipe(Frozen):
    """What a preparation makes its shards of; a stopped one is only continued with the same."""

    tokenizer: str
    tokenizer_sha256: str
    json_field: str
    sources_sha256: str


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Writes shards into `folder`."""

    folder: Path
    tokenizer: Tokenizer
    json_field: str

    def write(self, number: int, parts: Sequence[Part]) -> None:
        documents = (
            (self.tokenizer.encode(piece) for piece in document)
            for part in parts
            for document in read_documents(part, self.json_field)
        )
        write_shard(self.folder, number, documents, self.tokenizer.vocab_size, self.tokenizer.end_of_text)


def prepare_tokens(
    inputs: Sequence[Path],
    output: Path,
    *,
    tokenizer: str = "bytes",
    json_field: str = "text",
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> TokenHeader:
    """Encode the documents of `inputs` (files and folders) into the folder `output`; returns its header.

    Memory is bounded by the longest line or 1 MiB of text, per worker. Raises `UserError` for wrong input and for an
    `output` that holds something else than the start of this very preparation.
    """
    encoder = _Encoder(output, load_tokenizer(tokenizer, "--tokenizer"), json_field)
    parts = cut_sources(inputs, shard_bytes)
    recipe = Recipe(
        tokenizer=tokenizer,
        tokenizer_sha256=encoder.tokenizer.fingerprint,
        json_field=json_field,
        sources_sha256=_fingerprint(parts),
    )
    vocab_size = encoder.tokenizer.vocab_size
    with lock_folder(output):
        _begin(output, recipe)
        missing = [number for number in range(len(parts)) if shard_length(output, number, vocab_size) is None]
        _encode(encoder, parts, missing, workers)
        lengths = [shard_length(output, number, vocab_size) for number in range(len(parts))]
        header = TokenHeader(
            vocab_size=vocab_size,
            end_of_text=encoder.tokenizer.end_of_text,
            tokenizer=tokenizer,
            tokenizer_sha256=recipe.tokenizer_sha256,
            shards=tuple(length for length in lengths if length is not None),
        )
        if header.tokens == 0:
            raise UserError(f"{', '.join(map(str, inputs))}: holds no text")
        save(output / HEADER, header)
        (output / UNFINISHED).unlink()
    return header


def _begin(output: Path, recipe: Recipe) -> None:
    """Mark the folder as this preparation's, unless it holds another one's shards or is full of something else."""
    mark = output / UNFINISHED
    if (output / HEADER).exists():
        raise UserError(f"{output}: holds prepared tokens already; choose another --output, or remove it")
    if not mark.exists() and any(output.iterdir()):
        raise UserError(f"{output}: is not empty; choose another --output")
    if mark.exists() and load(mark, Recipe) != recipe:
        if any(output.glob("[0-9]*.tokens")):
            raise UserError(
                f"{output}: holds the start of a preparation from other sources, tokenizer or field; "
                "choose another --output, or remove it"
            )
        for begun in output.glob(".[0-9]*"):  # shards of a source with a mistake, say, which is mended now
            begun.unlink()
    save(mark, recipe)


def _encode(encoder: _Encoder, parts: list[tuple[Part, ...]], missing: list[int], workers: int) -> None:
    """Write the missing shards, every worker each n-th of them."""
    sizes = [sum(part.size for part in group) for group in parts]
    workers = max(1, min(workers, len(missing)))
    done_W = np.frombuffer(mmap.mmap(-1, 8 * workers), np.int64)  # bytes of text; shared with the forked workers

    def work(worker: int) -> None:
        for number in missing[worker::workers]:
            encoder.write(number, parts[number])
            done_W[worker] += sizes[number]

    total = sum(sizes[number] for number in missing)
    with Display().activity("tokenizing (MiB)", math.ceil(total / MIB)) as show:
        run_local_ranks(
            workers,
            lambda world: work(world.rank),
            encoder.folder,
            noun="worker",
            meanwhile=lambda: show(int(done_W.sum() / MIB)),
        )


def _fingerprint(parts: list[tuple[Part, ...]]) -> str:
    """Of the files' names, sizes and times of change."""
    files = {
        str(part.path.resolve()): (stat.st_size, stat.st_mtime_ns, part.named)
        for group in parts
        for part in group
        for stat in [part.path.stat()]
    }
    cuts = [[(str(part.path), part.start) for part in group] for group in parts]
    return hashlib.sha256(json.dumps([files, cuts]).encode()).hexdigest()

"""Back from a job of another system: its arguments or configuration file as a model, a job and a strategy."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from pipermoe.export.deepspeed import reading as deepspeed
from pipermoe.export.torchtitan import reading as torchtitan
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.documents import read_text
from pipermoe.specs.errors import UserError
from pipermoe.specs.megatron import Arguments, read_configuration


def read_job(
    source: str,
    words: Sequence[str],
    world_size: int | None,
    *,
    model: str | None = None,
    seq_len: int | None = None,
) -> Configuration:
    """What a job of the system `source` does: `words` are the file that configures it, or Megatron's command line.

    `model` and `seq_len` are for DeepSpeed, whose file names neither. UserError where the job says nothing legal.
    """
    if source == "megatron":
        arguments, ranks = read_megatron_arguments(words, world_size)
        return read_configuration(arguments, ranks, _file_name(words) or "megatron")
    if len(words) != 1:
        raise UserError(f"{source}: give the one file that configures the job")
    path, ranks = Path(words[0]), _given(world_size)
    if source == "torchtitan":
        return torchtitan.read(read_text(path), str(path), ranks)
    return deepspeed.read(path, ranks, model, seq_len)


def read_megatron_arguments(words: Sequence[str], world_size: int | None) -> tuple[Arguments, int]:
    """The arguments of a command line, or of the one file that holds it (comments start with #), and the ranks."""
    ranks = _given(world_size)
    if not words:
        raise UserError("give Megatron's arguments after --, or the file that holds them")
    if _file_name(words):
        path = Path(words[0])
        try:
            words = shlex.split(read_text(path), comments=True)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    return Arguments.parse(words), ranks


def _given(world_size: int | None) -> int:
    if world_size is None or world_size < 1:
        raise UserError("--world-size must be given: the data-parallel size is what the ranks leave over")
    return world_size


def _file_name(words: Sequence[str]) -> str:
    """The name of the file without its ending, if `words` are one."""
    return Path(words[0]).stem if len(words) == 1 and not words[0].startswith("--") else ""

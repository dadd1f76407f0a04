"""Before an all-to-all with splits known only locally: all ranks learn of all splits, or all of the same error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipermoe.exchange.plan import Ints
from pipermoe.specs.errors import UserError

TEXT_BYTES = 224  # for the dtype and the problem


@dataclass(frozen=True, slots=True)
class Request:
    """What one rank asks for: rows it sends to and expects from everyone, and what is wrong with its own arguments."""

    send_rows: tuple[int, ...]
    receive_rows: tuple[int, ...]
    row_bytes: int
    dtype: str
    problem: str = ""


def agree(request: Request, gather: Callable[[np.ndarray], np.ndarray]) -> Ints:
    """The rows from source to destination, [P, P]. `gather` gives the bytes of all ranks, [P, len].

    A message has the same length whatever is asked, so wrong arguments on one rank reach the others as an error before
    any data moves. UserError, the same on all ranks: a problem of some rank, dtypes or row sizes that differ, a rank
    that expects other rows than are sent.
    """
    size = len(request.send_rows)
    return _decode(gather(_encode(request)), size)


def _encode(request: Request) -> np.ndarray:
    numbers = np.array([request.row_bytes, *request.send_rows, *request.receive_rows], dtype=np.int64)
    text = f"{request.dtype}\n{request.problem}".encode()[:TEXT_BYTES]
    return np.concatenate([numbers.view(np.uint8), np.frombuffer(text.ljust(TEXT_BYTES, b"\0"), dtype=np.uint8)])


def _decode(gathered: np.ndarray, size: int) -> Ints:
    numbers = np.ascontiguousarray(gathered[:, : 8 * (1 + 2 * size)]).view(np.int64)
    texts = [bytes(row[8 * (1 + 2 * size) :]).rstrip(b"\0").decode(errors="replace") for row in gathered]
    dtypes, problems = zip(*(text.split("\n", 1) for text in texts), strict=True)
    for rank, problem in enumerate(problems):
        if problem:
            raise UserError(f"all_to_all: rank {rank}: {problem}")
    row_bytes, sent, expected = numbers[:, 0], numbers[:, 1 : 1 + size], numbers[:, 1 + size :].T
    for name, values in (("dtype", dtypes), ("bytes per row", row_bytes.tolist())):
        for rank, value in enumerate(values):
            if value != values[0]:
                raise UserError(f"all_to_all: {name} differs: {values[0]} on rank 0, {value} on rank {rank}")
    for source, destination in np.argwhere(sent != expected)[:1]:
        raise UserError(
            f"all_to_all: rank {source} sends {sent[source, destination]} rows to rank {destination}, "
            f"which expects {expected[source, destination]}"
        )
    return sent.copy()

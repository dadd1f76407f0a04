"""Who is to blame when ranks stop: the one that failed by itself, not those that failed because it had vanished."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipermoe.specs.errors import MachineError, UserError

WAITING = ", waiting for other ranks"  # ends what a rank says that it is doing, while it does nothing itself
_PLACE_IN_LIBRARY = re.compile(r"\[/\S+:\d+\] ")  # gloo begins its messages with a path of whoever has compiled it
_WITNESS_WORDS = (
    "connection closed by peer",
    "connection reset",
    "timed out",
    "timeout",
    "broken pipe",
    "socket closed",
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank stopped: by wrong input ("user"), an error of its "own", as a "witness" of another one that vanished,
    or because it was "told" to."""

    rank: int
    kind: Literal["user", "own", "witness", "told"]
    message: str

    @property
    def error(self) -> UserError:
        return UserError(self.message) if self.kind == "user" else MachineError(self.message)


def failure_of(rank: int, noun: str, error: BaseException, output: Path) -> Failure:
    """One line about `error`; the traceback of an unexpected one goes to a file."""
    if isinstance(error, UserError) and not isinstance(error, MachineError):
        return Failure(rank, "user", str(error))
    message = str(error) if isinstance(error, MachineError) else f"{noun} {rank}: {type(error).__name__}: {error}"
    message = _PLACE_IN_LIBRARY.sub("", next(iter(message.splitlines()), ""))
    if any(word in message.lower() for word in _WITNESS_WORDS):
        return Failure(rank, "witness", message)
    path = output / f"{noun}-{rank}.error.txt"
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return Failure(rank, "own", message)
    return Failure(rank, "own", f"{message} (traceback in {path})")


def named(noun: str, rank: int, doing: str) -> str:
    return f"{noun} {rank} ({doing})" if doing else f"{noun} {rank}"


def not_waiting(doing: Mapping[int, str]) -> list[int]:
    """Of ranks that have not answered those that had something to do themselves, or all of them if none had."""
    return [rank for rank, text in doing.items() if not text.endswith(WAITING)] or list(doing)


def culprit(failures: Mapping[int, Failure], silent: list[str], timeout_seconds: float) -> Failure:
    """The failure to report: a user's mistake, else a rank's own failure, else the ranks that fell `silent`."""
    for kind in ("user", "own"):
        for failure in failures.values():
            if failure.kind == kind:
                return failure
    witness = next(iter(failures.values()))
    if silent:
        message = f"{', '.join(silent)} stalled: no answer within {timeout_seconds:g} s ({witness.message})"
        return Failure(witness.rank, "own", message)
    return witness

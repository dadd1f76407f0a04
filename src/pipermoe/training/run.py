"""How a plan is run, beside what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

TIMEOUT_SECONDS = 180.0  # of one collective: a rank that is silent for longer counts as stalled


def _nobody(text: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Run:
    """The options of one run. `steps`: where to stop, if not where the plan does. `resume`: a checkpoint to go on from.

    `weights`: a folder of published weights to start from; the trained ones are written the same way. `trace_steps`,
    which count from 1, are written as a Chrome trace. `tell` is told what this rank is doing.
    """

    output: Path
    steps: int | None = None
    resume: Path | None = None
    weights: Path | None = None
    quiet: bool = False
    timeout: timedelta = timedelta(seconds=TIMEOUT_SECONDS)
    trace_steps: frozenset[int] = frozenset()
    tensorboard: Path | None = None
    device: str = "cpu"
    tell: Callable[[str], None] = _nobody

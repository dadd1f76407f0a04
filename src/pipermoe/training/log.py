"""What a run says of every step: a line in the order that people grep for; more as JSON lines and in TensorBoard."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from pipermoe.layout.trace import LOADS_FILE
from pipermoe.specs.report import MemoryCategory, Term
from pipermoe.specs.units import GIB, MIB
from pipermoe.training.balancing.balance_line import BalanceLine
from pipermoe.training.json_lines import JsonLines
from pipermoe.training.tensorboard import Board, open_board

STEPS_FILE = "steps.jsonl"
CONVENTION = (
    "tps: tokens/s of the whole job; tflops: model TFLOP/s per rank, the causal half of attention, no recompute; "
    "mfu: that over a rank's peak; memory: highest counted peak of a rank (share of the plan's budget)"
)
_COLOURS = {"step": 31, "loss": 32, "validation": 32, "grad_norm": 33, "memory": 36, "tps": 34, "tflops": 36, "mfu": 35}


@dataclass(frozen=True, slots=True)
class StepLine:
    """One step of the whole job. Steps count from 1, as people do. docs/training.md says what each field is.

    None: not known, not evaluated after this step, or experts do not move. `seconds_by_term` are those of rank 0.
    """

    step: int
    loss: float
    validation_loss: float | None
    mtp_loss: float | None
    auxiliary_loss: float
    z_loss: float
    dropped_share: float | None
    grad_norm: float
    learning_rate: float
    skipped: bool
    seconds: float
    tokens_per_second: float
    flops_per_second: float
    mfu: float | None
    peak_bytes: int | None
    memory_bytes: dict[MemoryCategory, int] | None
    resident_bytes: int
    expert_load: tuple[float, ...]
    dead_experts: tuple[int, ...]
    seconds_by_term: dict[Term, float]
    expert_layout: BalanceLine | None = None


def format_line(line: StepLine, budget_bytes: int, *, coloured: bool = False) -> str:
    """`step:     10  loss:  1.55680  grad_norm:  0.8123  memory: 26.47GiB(33.47%)  tps: 8,600  tflops: 240.10 ...`."""
    fields = {"step": f"{line.step:5d}", "loss": f"{line.loss:8.5f}", "grad_norm": f"{line.grad_norm:8.4f}"}
    if line.validation_loss is not None:
        fields["validation"] = f"{line.validation_loss:8.5f}"
    if line.peak_bytes is not None:
        scale, unit = (GIB, "GiB") if line.peak_bytes >= GIB else (MIB, "MiB")
        fields["memory"] = f"{line.peak_bytes / scale:6.2f}{unit}({line.peak_bytes / budget_bytes:.2%})"
    fields["tps"] = f"{line.tokens_per_second:8,.0f}"
    fields["tflops"] = f"{line.flops_per_second / 1e12:{'.2f' if line.flops_per_second >= 1e12 else '.2g'}}"
    if line.mfu is not None:
        fields["mfu"] = f"{line.mfu:.1%}"
    texts = (f"{name}: {value}" for name, value in fields.items())
    if coloured:
        texts = (f"\33[{_COLOURS[name]}m{text}\33[0m" for name, text in zip(fields, texts, strict=True))
    return "  ".join(texts)


class StepLog:
    """The lines of a run, on rank 0 only: on stdout (`quiet`: on stderr) for people, in `steps.jsonl` and `loads.jsonl`
    for programs.

    With `tensorboard`, the folder to write to, the numbers go there too.
    """

    def __init__(
        self,
        output: Path,
        budget_bytes: int,
        first_step: int,
        *,
        quiet: bool = False,
        tensorboard: Path | None = None,
    ) -> None:
        self._quiet, self._budget = quiet, budget_bytes
        self._board: Board | None = None if tensorboard is None else open_board(tensorboard)
        self._coloured = self._stream.isatty() and "NO_COLOR" not in os.environ
        self._steps = JsonLines(output / STEPS_FILE, first_step)
        self._loads = JsonLines(output / LOADS_FILE, first_step)

    def step(self, line: StepLine, load_LE: NDArray[np.int64]) -> None:
        """A step, and in `loads.jsonl` the rows of every expert of every MoE layer: what `pipermoe balance` reads."""
        self.say(format_line(line, self._budget, coloured=self._coloured))
        values = _known(asdict(line))
        self._steps.write(values)
        self._loads.write({"step": line.step, "counts": load_LE.tolist()})
        if self._board is not None:
            self._board.step(values)

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @property
    def _stream(self) -> TextIO:
        return sys.stderr if self._quiet else sys.stdout  # looked up anew: a progress bar puts itself in between

    def close(self) -> None:
        self._steps.close()
        self._loads.close()
        if self._board is not None:
            self._board.close()


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no number that is not finite: null stands for it."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }

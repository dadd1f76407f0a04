"""The numbers of every step as TensorBoard's event files, where that package is installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pipermoe.specs.errors import UserError


class Board(Protocol):
    def step(self, values: dict[str, Any]) -> None:
        """Show the numbers of one step, which is `values["step"]`."""
        ...

    def close(self) -> None: ...


def require_tensorboard() -> None:
    """Raise `UserError` without the package; asked before any rank starts."""
    if find_spec("tensorboard") is None:
        raise UserError("--tensorboard: needs the package tensorboard: pip install 'pipermoe[tensorboard]'")


def open_board(folder: Path) -> Board:
    """Event files in `folder`. Raises `UserError` where they cannot be written."""
    from torch.utils.tensorboard.writer import SummaryWriter

    try:
        return _EventFiles(SummaryWriter(str(folder)))
    except OSError as error:
        raise UserError(f"--tensorboard = {folder}: cannot be written: {error.strerror}") from None


class _EventFiles:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def step(self, values: dict[str, Any]) -> None:
        for name, number in _scalars(values):
            self._writer.add_scalar(name, number, values["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number by a name with slashes: `loss`, `memory_bytes/weights`, `expert_load/3` (the MoE layer)."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (list, tuple)):
            yield from _scalars({str(i): each for i, each in enumerate(value)}, f"{prefix}{name}/")
        elif value is not None:
            yield prefix + name, float(value)

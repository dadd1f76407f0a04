"""What every local process is doing, in memory that all share: the parent can still read it when one has died."""

from __future__ import annotations

import mmap
from collections.abc import Callable

_WIDTH = 128  # bytes of a process's line


class StatusBoard:
    """One line of text for each of `processes` forked processes."""

    def __init__(self, processes: int) -> None:
        self._memory = mmap.mmap(-1, processes * _WIDTH)

    def writer(self, process: int) -> Callable[[str], None]:
        """A function that sets the line of `process`."""
        memory, lines = self._memory, slice(process * _WIDTH, (process + 1) * _WIDTH)

        def write(text: str) -> None:
            memory[lines] = text.encode()[:_WIDTH].ljust(_WIDTH, b"\0")

        return write

    def read(self, process: int) -> str:
        line = self._memory[process * _WIDTH : (process + 1) * _WIDTH]
        return line.rstrip(b"\0").decode(errors="replace")

"""What a step tells about itself while it runs: seconds by term, and the phase in which tensors are born."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipermoe.specs.report import TERMS, MemoryCategory, Term


class Meter:
    """Seconds by term of the current step, and the memory category of tensors born now.

    Nested terms are exclusive: waiting for an all-to-all inside a forward action counts as `all_to_all` alone, so the
    terms of a step add up to at most its duration.
    """

    def __init__(self) -> None:
        self.seconds: dict[Term, float] = dict.fromkeys(TERMS, 0.0)
        self.phase: MemoryCategory = "temporary"
        self._inner = 0.0  # seconds already counted by terms nested in the current one

    def reset(self) -> None:
        self.seconds = dict.fromkeys(TERMS, 0.0)

    @contextmanager
    def term(self, name: Term) -> Iterator[None]:
        """Count the time of the block as `name`, less what nested blocks count."""
        outer, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] += elapsed - self._inner
            self._inner = outer + elapsed

    @contextmanager
    def born(self, phase: MemoryCategory) -> Iterator[None]:
        """Tensors created in the block belong to `phase`."""
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outer

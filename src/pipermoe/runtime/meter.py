"""What a step tells about itself while it runs: what it is doing, seconds by term, in what phase tensors are born."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from pipermoe.schedule.action import Action
from pipermoe.specs.report import TERMS, MemoryCategory, Term


class Meter:
    """Seconds by term of the current step, and the memory category of tensors born now.

    Nested terms are exclusive: waiting for an all-to-all inside a forward action counts as `all_to_all` alone, so the
    terms of a step add up to at most its duration. `action` is what the rank is doing: an action of the schedule or,
    after the pipeline, the name of a part of the step.
    """

    def __init__(self) -> None:
        self.seconds: dict[Term, float] = dict.fromkeys(TERMS, 0.0)
        self.phase: MemoryCategory = "temporary"
        self.action: Action | str = ""
        self.on_release: Callable[[Tensor], None] | None = None
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

    def release(self, tensor: Tensor) -> None:
        """The caller drops the last reference to a collective's buffer.

        Gloo's threads may hold a finished buffer for an instant longer; counting must not depend on when they let go.
        """
        if self.on_release is not None:
            self.on_release(tensor)

"""What a step tells about itself while it runs: what it is doing, seconds by term, in what phase tensors are born."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

from pipermoe.runtime.trace import Trace
from pipermoe.schedule.action import Action
from pipermoe.specs.report import TERMS, MemoryCategory, Term

WAITS: frozenset[Term | None] = frozenset({"all_to_all", "pipeline_wait", "gradient_sync"})  # for other ranks


class Meter:
    """Seconds by term of the current step, and the memory category of tensors born now.

    Nested terms are exclusive: waiting for an all-to-all inside a forward action counts as `all_to_all` alone, so the
    terms of a step add up to at most its duration. `action` is what the rank is doing: an action of the schedule or,
    after the pipeline, the name of a part of the step; `on_change` is told of every new one, and when the rank begins
    and ends to wait for others; `trace` of every stretch of time.
    """

    def __init__(self) -> None:
        self.seconds: dict[Term, float] = dict.fromkeys(TERMS, 0.0)
        self.phase: MemoryCategory = "temporary"
        self.on_release: Callable[[Tensor], None] | None = None
        self.on_change: Callable[[Action | str, bool], None] | None = None
        self.on_exchange: Callable[[dist.ProcessGroup, Tensor, Sequence[int] | None], None] | None = None
        self.trace: Trace | None = None
        self._action: Action | str = ""
        self._term: Term | None = None
        self._since = 0.0  # when the current stretch of `_term` began

    @property
    def counting(self) -> bool:
        """Whether a counter follows this step."""
        return self.on_release is not None

    def reset(self) -> None:
        self.seconds = dict.fromkeys(TERMS, 0.0)

    @property
    def action(self) -> Action | str:
        return self._action

    @action.setter
    def action(self, action: Action | str) -> None:
        self._end_stretch()
        self._action = action
        self._tell()

    @contextmanager
    def term(self, name: Term) -> Iterator[None]:
        """Count the time of the block as `name`, less what nested blocks count."""
        outer = self._term
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, name: Term | None) -> None:
        self._end_stretch()
        waited = self._term in WAITS
        self._term = name
        if (name in WAITS) != waited:
            self._tell()

    def _tell(self) -> None:
        if self.on_change is not None:
            self.on_change(self._action, self._term in WAITS)

    def _end_stretch(self) -> None:
        now = time.perf_counter()
        if self._term is not None:
            self.seconds[self._term] += now - self._since
            if self.trace is not None:
                self.trace.add_stretch(self._term, str(self._action), self._since, now)
        self._since = now

    def launched(self, lane: str) -> Callable[[], None]:
        """A transfer of the current action begins in `lane` of the trace; the result is to be called when it ended."""
        trace, action, start = self.trace, self._action, time.perf_counter()
        if trace is None:
            return _ignore
        return lambda: trace.add(lane, str(action), start, time.perf_counter())

    @contextmanager
    def born(self, phase: MemoryCategory) -> Iterator[None]:
        """Tensors created in the block belong to `phase`."""
        outer, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = outer

    def exchanged(self, group: dist.ProcessGroup, sent: Tensor, sent_rows: Sequence[int] | None) -> None:
        """An all-to-all begins that is none of torch's, which a counter would see by itself."""
        if self.on_exchange is not None:
            self.on_exchange(group, sent, sent_rows)

    def release(self, tensor: Tensor) -> None:
        """The caller drops the last reference to a collective's buffer.

        Gloo's threads may hold a finished buffer for an instant longer; counting must not depend on when they let go.
        """
        if self.on_release is not None:
            self.on_release(tensor)


def _ignore() -> None:
    pass

"""Planning beside training: a thread looks for the next layout while steps go on, and may take only so long."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Thread

from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.specs.errors import MachineError


class Planning:
    """One search, begun at once. `seconds` is how long it took, None while it runs."""

    def __init__(self, search: Callable[[], ExpertLayout], timeout_seconds: float) -> None:
        self.seconds: float | None = None
        self._layout: ExpertLayout | None = None
        self._error: Exception | None = None
        self._search, self._began, self._timeout = search, time.perf_counter(), timeout_seconds
        self._thread = Thread(target=self._run, name="expert layout", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._layout = self._search()
        except Exception as error:
            self._error = error
        self.seconds = time.perf_counter() - self._began

    def join(self) -> None:
        """Wait until it has ended."""
        self._thread.join()

    @property
    def late(self) -> bool:
        """Whether it runs for longer than it may."""
        return self.seconds is None and time.perf_counter() - self._began > self._timeout

    def result(self) -> ExpertLayout | None:
        """What was found, None while it runs. Raises `MachineError` where the search failed."""
        if self.seconds is None:
            return None
        if self._error is not None:
            name = type(self._error).__name__
            raise MachineError(f"planning an expert layout failed: {name}: {self._error}") from self._error
        return self._layout

"""Generators of a micro-batch's work, and the ways to run them: to the end at once, alone, or two in turn.

A generator yields right after launching a collective, so its caller may compute something else meanwhile. Which turn
follows which depends on the generators alone and not on time: all ranks of an expert group launch in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Generic, NamedTuple, TypeVar

from pipermoe.runtime.pipeline.flight import Flight

Result = TypeVar("Result")


class Pause(NamedTuple):
    """Where a generator stands: what it has launched last, and whether its next turn computes next to nothing."""

    flight: Flight
    brief: bool = False


Steps = Generator[Pause, None, Result]


def drain(steps: Steps[Result]) -> Result:
    """Run a generator to its end: the serial execution, which defines the result of every other."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class Running(Generic[Result]):
    """A generator under way; each of its turns runs inside `turn()`, which says in whose name."""

    def __init__(self, steps: Steps[Result], turn: Callable[[], AbstractContextManager[None]]):
        self._steps, self._turn, self._results = steps, turn, []
        self.pause: Pause | None = None

    @property
    def done(self) -> bool:
        return bool(self._results)

    @property
    def result(self) -> Result:
        return self._results[0]

    def advance(self) -> None:
        """Run to the next launch, or to the end; nothing at the end."""
        if self.done:
            return
        with self._turn():
            try:
                self.pause = next(self._steps)
            except StopIteration as end:
                self.pause = None
                self._results.append(end.value)


def alone(running: Running[Result], fill: Callable[[], bool]) -> Result:
    """While what a generator has launched is on its way, `fill` does a bit of other work, and says if there was any."""
    while not running.done:
        running.advance()
        while running.pause is not None and not running.pause.flight.arrived() and fill():
            pass
    return running.result


def beside(forward: Running, backward: Running, fill: Callable[[], bool]) -> None:
    """Two generators in turn: what one has launched travels while the other computes.

    A forward has three launches a layer, counts, dispatch and combine, a backward two. The turn that only reads counts
    and launches the dispatch hides nothing, so it takes none from the backward: what lies before it is `fill`, weight
    gradients that the backward has left behind. Each all-to-all then has a computation of the other beside it, and the
    link one at a time. Weight gradients also run beside the longer of the two when the other has ended. `fill` does as
    many as a rule says that is the same on all ranks.

        backward          experts'          attention'                            experts' ...
        forward   attend            experts              merge, attend   (W) route          experts ...
    """
    while not (forward.done and backward.done):
        backward.advance()
        if backward.done:
            fill()
        forward.advance()
        if forward.done:
            fill()
        elif forward.pause is not None and forward.pause.brief:
            fill()
            forward.advance()

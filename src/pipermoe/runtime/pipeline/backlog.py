"""Weight gradients that are put off, and which of them may run next."""

from __future__ import annotations

from collections.abc import Iterable

from pipermoe.modules.weight_gradients import Accumulate, Milestone
from pipermoe.schedule.action import Action, Kind


class Backlog:
    """What the I actions of one step have left behind, and the backwards of pairs.

    A weight gradient may run before its W action, where its rank would wait. But each stage's run in the order of the
    schedule, early or not: a parameter's gradients are added in the same order always, and the sum is the same bit for
    bit. `actions` are all elementary actions of the rank.
    """

    def __init__(self, actions: Iterable[Action]):
        self._ahead = [each for each in actions if each.kind in (Kind.BACKWARD, Kind.WEIGHT_GRAD)][::-1]
        self._queues: dict[tuple[int, int], list[Accumulate]] = {}
        self._taken: dict[tuple[int, int], int] = {}  # how many of each queue

    def open(self, stage: int, microbatch: int) -> list[Accumulate]:
        """The queue that a backward of (stage, microbatch) fills."""
        queue = self._queues[stage, microbatch] = []
        self._taken[stage, microbatch] = 0
        return queue

    def added(self, stage: int, microbatch: int) -> int:
        """How many weight gradients this backward has left behind, whether they have run since or not."""
        queue = self._queues[stage, microbatch]
        return sum(not isinstance(each, Milestone) for each in queue) + self._taken[stage, microbatch]

    def take(self) -> tuple[Action, Accumulate] | None:
        """The next one that may run now, and in whose name."""
        if not any(self._queues.values()):
            return None
        blocked: set[int] = set()
        for action in reversed(self._ahead):
            key = (action.stage, action.microbatch)
            if action.stage not in blocked:
                queue = self._queues.get(key, [])
                for place, pending in enumerate(queue):
                    if not isinstance(pending, Milestone):
                        self._taken[key] += 1
                        return action, queue.pop(place)
            if key not in self._queues:  # still to come, while all of an open queue has run
                blocked.add(action.stage)
        return None

    def finish(self, action: Action) -> None:
        """Run what is left of a B or W action, whose turn it is. Each that has run lets go of what it read."""
        ahead = self._ahead.pop()
        assert ahead == action, f"{action} comes before {ahead}"
        queue = self._queues.pop((action.stage, action.microbatch), [])[::-1]
        while queue:
            queue.pop()()

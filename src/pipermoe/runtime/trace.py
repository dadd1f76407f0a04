"""What a rank did when: stretches of computing by action, and transfers from launch to the end of the wait for them."""

from __future__ import annotations

import time
from typing import Any

from pipermoe.specs.chrome_trace import Span
from pipermoe.specs.report import Term

COMPUTE, ALL_TO_ALL, POINT_TO_POINT, REDUCE = "compute", "all-to-all", "point-to-point", "reduce"
# Waiting inside an action is the gap that it leaves in the lane of computing; the transfer waited for has its own lane.
_LANES: dict[Term, str] = {
    "forward": COMPUTE,
    "backward": COMPUTE,
    "optimizer": COMPUTE,
    "gradient_sync": REDUCE,
}


class Trace:
    """The spans of one rank, on the wall clock: equal for ranks of one machine, as good as its synchronisation beyond.

    Times are those of the host. On a GPU, where kernels run later than they are launched, they show the launches.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.spans: list[Span] = []
        self._epoch = time.time() - time.perf_counter()

    def add_stretch(self, term: Term, action: str, start: float, end: float) -> None:
        """The rank was busy with `term` of `action` from `start` to `end` (time.perf_counter)."""
        if term in _LANES:
            self.add(_LANES[term], action, start, end, term)

    def add(self, lane: str, action: str, start: float, end: float, category: str = "") -> None:
        """`action` occupied `lane` from `start` to `end` (time.perf_counter)."""
        self.spans.append(Span(self.rank, lane, action, start + self._epoch, end + self._epoch, category or lane))

    def to_json(self) -> list[Any]:
        return [[span.lane, span.name, span.start, span.end, span.category] for span in self.spans]


def spans_of(rank: int, rows: list[Any]) -> list[Span]:
    """What `Trace.to_json` of `rank` stands for."""
    return [Span(rank, *row) for row in rows]

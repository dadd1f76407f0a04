"""A link that takes its time: all-to-alls arrive as late as one of a given bandwidth would bring them.

On a CPU, where moving bytes costs the cores that compute, this is how overlap can be seen: an emulated transfer needs
no core, as one by a network card.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from pipermoe.runtime.pipeline.flight import Transport, Work


class EmulatedLink:
    """Carries what `transport` does, one all-to-all after the other, each for (bytes that leave the rank) / bandwidth.

    `wait` holds until then. `now` and `sleep` are a clock, in seconds; `waited` adds up what waits held.
    """

    def __init__(
        self,
        transport: Transport,
        rank: int,
        bytes_per_second: float,
        *,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._transport, self._rank, self._bandwidth = transport, rank, bytes_per_second
        self.now, self.sleep = now, sleep
        self._free = 0.0
        self.waited = 0.0

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_rows: Sequence[int] | None, sent_rows: Sequence[int] | None
    ) -> Work:
        work = self._transport.all_to_all(received, sent, received_rows, sent_rows)
        seconds = 0.0
        if sent_rows is not None:  # routing counts, which have even parts, are too few to take time
            leaving = sum(sent_rows) - sent_rows[self._rank]
            seconds = leaving * sent[:1].numel() * sent.element_size() / self._bandwidth
        self._free = max(self.now(), self._free) + seconds
        return _Held(self, work, self._free)


class _Held:
    """A transfer that has not arrived before `until`, whatever the carrier says."""

    def __init__(self, link: EmulatedLink, work: Work, until: float):
        self._link, self._work, self._until = link, work, until

    def is_completed(self) -> bool:
        return self._link.now() >= self._until

    def wait(self) -> None:
        self._work.wait()
        seconds = self._until - self._link.now()
        if seconds > 0:
            self._link.sleep(seconds)
            self._link.waited += seconds

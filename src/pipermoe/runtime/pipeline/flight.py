"""Collectives in flight: what `wait` gives once it has arrived, and who carries it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipermoe.runtime.meter import Meter
from pipermoe.runtime.trace import ALL_TO_ALL

Result = TypeVar("Result")
Arrival = TypeVar("Arrival", covariant=True)


class Flight(Protocol[Arrival]):
    """Something on its way. Rank by rank all flights are launched in the same order; waiting is in any."""

    def arrived(self) -> bool:
        """Whether `wait` would return at once."""
        ...

    def wait(self) -> Arrival:
        """What has arrived; to be called once."""
        ...


class Work(Protocol):
    """torch's handle of an asynchronous collective, or what acts like one."""

    def is_completed(self) -> bool: ...

    def wait(self) -> Any: ...


class Transport(Protocol):
    """Carries the uneven all-to-alls of one group of ranks."""

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_rows: Sequence[int] | None, sent_rows: Sequence[int] | None
    ) -> Work:
        """Launch: `sent_rows[p]` rows of `sent` go to rank p, `received_rows[p]` come from it; None: even parts."""
        ...


class Collective:
    """torch's all_to_all_single: NCCL's on a stream of its own, gloo's in threads of its own."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_rows: Sequence[int] | None, sent_rows: Sequence[int] | None
    ) -> Work:
        splits = (list(rows) if rows is not None else None for rows in (received_rows, sent_rows))
        work = dist.all_to_all_single(received, sent, *splits, group=self._group, async_op=True)
        assert work is not None
        return work


class Flying(Generic[Result]):
    """A collective in flight. It keeps its buffers alive; `finish` makes the result of the received tensor."""

    def __init__(self, work: Work, sent: Tensor, received: Tensor, finish: Callable[[Tensor], Result], meter: Meter):
        self._work, self._buffers, self._finish, self._meter = work, (sent, received), finish, meter
        self._landed = meter.launched(ALL_TO_ALL)

    def arrived(self) -> bool:
        return self._work.is_completed()

    def wait(self) -> Result:
        with self._meter.term("all_to_all"):
            self._work.wait()
        self._landed()
        sent, received = self._buffers
        del self._buffers, self._work
        self._meter.release(sent)
        result = self._finish(received)
        if result is not received:
            self._meter.release(received)
        return result


class Arrived(Generic[Result]):
    """What needed no travel."""

    def __init__(self, result: Result):
        self._result = result

    def arrived(self) -> bool:
        return True

    def wait(self) -> Result:
        result = self._result
        del self._result
        return result


class Both:
    """Two flights of which both are needed."""

    def __init__(self, first: Flight[Tensor], second: Flight[Tensor]):
        self._flights = first, second

    def arrived(self) -> bool:
        return all(flight.arrived() for flight in self._flights)

    def wait(self) -> tuple[Tensor, Tensor]:
        first, second = self._flights
        return first.wait(), second.wait()


class NumbersFlying:
    """Small integers on their way to the host, the one thing that it reads from a device in a layer.

    On a GPU they are copied on a side stream, so that reading them waits for their exchange and not for whatever the
    host has put on the compute stream since.
    """

    def __init__(self, work: Work, own: Tensor, received: Tensor, meter: Meter):
        self._work, self._own, self._received, self._meter = work, own, received, meter
        self._copied: torch.Event | None = None
        if received.is_cuda:
            side = torch.cuda.Stream(received.device)
            side.wait_stream(torch.cuda.current_stream(received.device))
            with torch.cuda.stream(side):
                work.wait()
                numbers = torch.cat((own, received))
                self._host = torch.empty_like(numbers, device="cpu", pin_memory=True)
                self._host.copy_(numbers, non_blocking=True)
                self._copied = side.record_event()

    def arrived(self) -> bool:
        return self._work.is_completed() if self._copied is None else self._copied.query()

    def wait(self) -> list[int]:
        """The numbers that this rank sent, then those that it received."""
        with self._meter.term("all_to_all"):
            if self._copied is not None:
                self._copied.synchronize()
                return self._host.tolist()
            self._work.wait()
        numbers = torch.cat((self._own, self._received)).tolist()
        self._meter.release(self._own)
        self._meter.release(self._received)
        return numbers

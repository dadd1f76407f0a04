"""One step of a real run under the counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pipermoe.runtime.counters import Counters, FlopCounter, MemoryCounter, TrafficCounter, counted_report
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.specs.report import RankReport

Result = TypeVar("Result")


def counted(rank: int, meter: Meter, optimizer: Optimizer, step: Callable[[], Result]) -> tuple[Result, RankReport]:
    """`step()`, and what it used on this rank."""
    memory, flops, traffic = MemoryCounter(meter, optimizer.tensors()), FlopCounter(), TrafficCounter()
    meter.on_exchange = traffic.count_all_to_all
    with Counters(memory, flops, traffic):
        result = step()
    meter.on_exchange = None
    return result, counted_report(rank, memory, flops, traffic)

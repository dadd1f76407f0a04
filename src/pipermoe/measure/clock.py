"""How long a call takes: a CPU rank's own computing time, or a GPU's time between two events."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pipermoe.measure.samples import Samples, summarize

Call = Callable[[], object]
Clock = Callable[[Call, int], float]
SHORTEST_SAMPLE = 200e-6  # shorter calls are timed several at a time: far above the clock's resolution
FEWEST_SAMPLES, MOST_SAMPLES = 3, 50


def cpu_seconds(call: Call, times: int) -> float:
    """Seconds that this thread computed in `times` calls.

    Thread time, not wall time: other load on the machine does not slow the rank's rate down. What several ranks at work
    cost each other by sharing cores is measured separately (`Host.compute_slots`).
    """
    start = time.thread_time()
    for _ in range(times):
        call()
    return time.thread_time() - start


def gpu_seconds(call: Call, times: int) -> float:
    """Seconds between two events on the current stream around `times` calls, launch gaps included."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def wall_seconds(call: Call, times: int) -> float:
    """Seconds on the wall clock of `times` calls; on a GPU until its work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_call(call: Call, clock: Clock, budget_seconds: float) -> Samples:
    """Robust seconds of one `call`, repeated for about `budget_seconds` after two calls of warm-up."""
    clock(call, 1)
    first = max(clock(call, 1), 1e-9)
    times = max(1, round(SHORTEST_SAMPLE / first))
    repeats = min(MOST_SAMPLES, max(FEWEST_SAMPLES, round(budget_seconds / (times * first))))
    return summarize([clock(call, times) / times for _ in range(repeats)])

"""The Chrome trace format, which chrome://tracing and ui.perfetto.dev show: a process per rank, a thread per lane."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipermoe.specs.documents import write_atomically

MICROSECONDS = 1e6


@dataclass(frozen=True, slots=True)
class Span:
    """`name` occupied `lane` of `rank` from `start` to `end` (seconds)."""

    rank: int
    lane: str
    name: str
    start: float
    end: float
    category: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """The counter `name` of `rank` had the value `value` from `time` (seconds) on."""

    rank: int
    name: str
    time: float
    value: float


def write_chrome_trace(path: Path, spans: Iterable[Span], samples: Iterable[Sample] = ()) -> None:
    """Write the spans in lanes in the order in which these first appear; what overlaps in a lane gets lanes beside it.

    Times begin with the first span. Raises `UserError` if the file cannot be written.
    """
    spans, samples = list(spans), list(samples)
    zero = min((span.start for span in spans), default=0.0)
    events = [*_span_events(spans, zero), *_sample_events(samples, zero)]
    write_atomically(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _span_events(spans: list[Span], zero: float) -> Iterator[dict[str, Any]]:
    order = {lane: position for position, lane in enumerate(dict.fromkeys(span.lane for span in spans))}
    for rank in sorted({span.rank for span in spans}):
        own = sorted((span for span in spans if span.rank == rank), key=lambda span: (order[span.lane], span.start))
        yield _name("process_name", rank, 0, f"rank {rank}")
        thread = 0
        for lane in dict.fromkeys(span.lane for span in own):
            for row, members in enumerate(_rows([span for span in own if span.lane == lane])):
                yield _name("thread_name", rank, thread, f"{lane} {row + 1}" if row else lane)
                yield {
                    "ph": "M",
                    "name": "thread_sort_index",
                    "pid": rank,
                    "tid": thread,
                    "args": {"sort_index": thread},
                }
                yield from (_complete(span, thread, zero) for span in members)
                thread += 1


def _rows(spans: list[Span]) -> list[list[Span]]:
    """Spans, ordered by start, in as few rows as keep them apart in each."""
    rows: list[list[Span]] = []
    for span in spans:
        row = next((row for row in rows if row[-1].end <= span.start), None)
        if row is None:
            rows.append(row := [])
        row.append(span)
    return rows


def _complete(span: Span, thread: int, zero: float) -> dict[str, Any]:
    start, end = ((time - zero) * MICROSECONDS for time in (span.start, span.end))
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.category,
        "pid": span.rank,
        "tid": thread,
        "ts": start,
        "dur": end - start,
        "args": dict(span.details),
    }


def _name(kind: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": {"name": name}}


def _sample_events(samples: list[Sample], zero: float) -> Iterator[dict[str, Any]]:
    for sample in samples:
        time = (sample.time - zero) * MICROSECONDS
        yield {"ph": "C", "name": sample.name, "pid": sample.rank, "ts": time, "args": {sample.name: sample.value}}

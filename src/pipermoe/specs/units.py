"""Quantities as people write them ("80GiB", "400Gb/s", "19.5TFLOP/s", "2us") to SI base units, and back for printing.

Inside the package every quantity is a plain number in bytes, seconds, FLOP or FLOP/s; text exists only at the edges.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated

from pydantic import BeforeValidator

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_DECIMAL = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": KIB, "Mi": MIB, "Gi": GIB, "Ti": TIB}
_TIME = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0, "d": 86400.0}
_RANGES = re.compile(r"\d{1,9}(-\d{1,9})?(, ?\d{1,9}(-\d{1,9})?)*")
_NUMBER = re.compile(r"\s*([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-zµ/]*)\s*")


def _split(text: str, example: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text)
    if not match:
        raise ValueError(f"must be a number with a unit, for example {example}")
    return float(match[1].replace("_", "")), match[2]


def _scaled(text: str, suffixes: dict[str, float], example: str) -> float:
    """`text` scaled by the longest unit suffix in `suffixes` and a decimal or binary prefix before it."""
    number, unit = _split(text, example)
    for suffix in sorted(suffixes, key=len, reverse=True):
        if unit.endswith(suffix):
            prefix = unit[: len(unit) - len(suffix)]
            scale = (_DECIMAL | _BINARY).get(prefix)
            if scale is not None:
                return number * scale * suffixes[suffix]
    raise ValueError(f"has the unknown unit {unit!r}; write it like {example}")


def parse_bytes(value: object) -> object:
    """Bytes from "80GiB", "64GB" or a plain number of bytes."""
    return round(_scaled(value, {"B": 1.0}, '"80GiB" or "64GB"')) if isinstance(value, str) else value


def parse_bandwidth(value: object) -> object:
    """Bytes per second from "450GB/s", "400Gb/s" (bits) or a plain number of bytes per second."""
    return _scaled(value, {"B/s": 1.0, "b/s": 0.125}, '"450GB/s" or "400Gb/s"') if isinstance(value, str) else value


def parse_flops(value: object) -> object:
    """FLOP per second from "989TFLOP/s", "989TFLOPS" or a plain number."""
    suffixes = {"FLOP/s": 1.0, "FLOPS": 1.0, "FLOPs": 1.0}
    return _scaled(value, suffixes, '"989TFLOP/s"') if isinstance(value, str) else value


def parse_seconds(value: object) -> object:
    """Seconds from "2us", "1.5 ms", "3 d" or a plain number of seconds."""
    if not isinstance(value, str):
        return value
    number, unit = _split(value, '"2us" or "1.5ms"')
    if unit not in _TIME:
        raise ValueError(f"has the unknown unit {unit!r}; accepted: {', '.join(_TIME)}")
    return number * _TIME[unit]


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
BytesPerSecond = Annotated[float, BeforeValidator(parse_bandwidth)]
FlopsPerSecond = Annotated[float, BeforeValidator(parse_flops)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]


def format_bytes(count: float) -> str:
    """`1536 -> "1.50 KiB"`; three significant places at most."""
    for scale, unit in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def option_bytes(count: float) -> str:
    """Bytes as an option takes them, in whole GiB or else, rounded up, in MiB: "80GiB", "612MiB"."""
    mebibytes = math.ceil(count / MIB)
    return f"{mebibytes // 1024}GiB" if mebibytes % 1024 == 0 else f"{mebibytes}MiB"


def format_seconds(seconds: float) -> str:
    """`0.0123 -> "12.3 ms"`."""
    magnitude = abs(seconds)
    if magnitude >= 1 or magnitude == 0:
        return f"{seconds:.3g} s"
    if magnitude >= 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} µs"


def format_count(count: float, unit: str = "") -> str:
    """`1.53e12, "FLOP" -> "1.53 TFLOP"`, with decimal prefixes."""
    for scale, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= scale:
            return f"{count / scale:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}".rstrip()


def format_number(number: float, of: str) -> str:
    """`1, "rank"` as "1 rank", `2048, "rank"` as "2,048 ranks", `1.6283, "core"` as "1.63 cores"."""
    return f"{number:{',' if isinstance(number, int) else '.3g'}} {of}{'s' * (number != 1)}"


def format_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in runs: `(0, 1, 2, 6)` as "0-2, 6"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def parse_ranges(text: str, limit: int) -> list[int]:
    """The numbers below `limit` that such a text lists. ValueError for anything else."""
    runs = [tuple(map(int, run.split("-"))) for run in text.split(",")] if _RANGES.fullmatch(text) else []
    sizes = [run[-1] - run[0] + 1 for run in runs]
    if not runs or min(sizes) < 1 or sum(sizes) > limit or max(map(max, runs)) >= limit:
        raise ValueError(f"{text[:40]!r} must be runs of numbers below {limit:,}, such as '0-511, 1024-1535'")
    return [number for run in runs for number in range(run[0], run[-1] + 1)]

"""Robust statistics of repeated timings, and the record of one measured point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OUTLIER_DEVIATIONS = 5.0  # in robust standard deviations; a preempted sample is tens of them away
SMALLEST_DEVIATION = 0.01  # of the median: identical timings must not turn the clock's resolution into outliers


@dataclass(frozen=True, slots=True)
class Samples:
    """The median of the kept timings (seconds), their spread (interquartile range over median), how many were kept."""

    seconds: float
    spread: float
    kept: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Point:
    """One measured problem: `size` is the abscissa of its curve, `work` (FLOPs, bytes, elements) took `seconds`."""

    size: float
    work: float
    seconds: float
    spread: float = 0.0
    kept: int = 1
    dropped: int = 0

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.work / self.seconds


def summarize(timings: Sequence[float]) -> Samples:
    """Drop timings further than `OUTLIER_DEVIATIONS` from the median, then take the median of the rest.

    The scale is the median absolute deviation x 1.4826 (equals the standard deviation for normal noise), so up to half
    of the samples may be spoilt without moving the result far.
    """
    values = np.asarray(timings, dtype=float)
    centre = np.median(values)
    scale = max(1.4826 * float(np.median(np.abs(values - centre))), SMALLEST_DEVIATION * float(centre))
    kept = values[np.abs(values - centre) <= OUTLIER_DEVIATIONS * scale]
    low, median, high = np.percentile(kept, [25, 50, 75])
    return Samples(float(median), float((high - low) / median), len(kept), len(values) - len(kept))


def merge_ranks(per_rank: Sequence[Sequence[Point]]) -> list[Point]:
    """The points that all ranks measured, each the median over ranks; counts add up, the widest spread stands."""
    merged = []
    for points in zip(*per_rank, strict=False):
        first = points[0]
        seconds = float(np.median([point.seconds for point in points]))
        spread = max(point.spread for point in points)
        kept, dropped = sum(point.kept for point in points), sum(point.dropped for point in points)
        merged.append(Point(first.size, first.work, seconds, spread, kept, dropped))
    return merged

"""From measured points to the curves and costs of a Platform."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipermoe.measure.samples import Point
from pipermoe.specs.device import RateCurve
from pipermoe.specs.network import LinkCost

BINS_PER_OCTAVE = 1  # sizes closer than this share one point of a curve
HUBER = 1.345  # residuals beyond this many robust deviations count linearly, not squared
UNRESOLVED = 0.01  # when bytes make no measurable difference, they are said to cost this share of the largest call


def fit_rate_curve(points: Sequence[Point]) -> RateCurve:
    """Rate against size. Points whose sizes round to the same power of two become one: their work over their time."""
    bins: dict[int, list[Point]] = {}
    for point in points:
        bins.setdefault(round(BINS_PER_OCTAVE * np.log2(point.size)), []).append(point)
    ordered = sorted((_joined(group) for group in bins.values()), key=lambda point: point.size)
    return RateCurve(
        size=tuple(float(f"{point.size:.6g}") for point in ordered),
        rate=tuple(float(f"{point.rate:.6g}") for point in ordered),
    )


def _joined(points: Sequence[Point]) -> Point:
    size = float(np.exp(np.mean([np.log(point.size) for point in points])))
    return Point(size, sum(point.work for point in points), sum(point.seconds for point in points))


def fit_link_cost(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[LinkCost, float]:
    """Latency and bandwidth of seconds = latency + size / bandwidth, and the relative RMS error of the fit.

    Least squares of the *relative* error, so that small messages count as much as large ones; Huber weights, so that
    one spoilt size does not bend the line; latency and time per byte are never negative.
    """
    x, t = np.asarray(sizes, dtype=float), np.asarray(seconds, dtype=float)
    weights = np.ones_like(t)
    for _ in range(20):
        latency, per_byte = _non_negative_line(x, t, weights)
        errors = (latency + per_byte * x) / t - 1
        scale = max(1.4826 * float(np.median(np.abs(errors))), 1e-9)
        weights = np.minimum(1.0, HUBER * scale / np.maximum(np.abs(errors), 1e-300))
    if per_byte <= 0:
        per_byte = UNRESOLVED * float(t[x.argmax()]) / float(x.max())
    residual = float(np.sqrt(np.mean(errors**2)))
    cost = LinkCost(latency_seconds=float(f"{latency:.6g}"), bandwidth_bytes_per_s=float(f"{1 / per_byte:.6g}"))
    return cost, round(residual, 4)


def _non_negative_line(x: np.ndarray, t: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The (latency, seconds per byte) >= 0 that minimise sum of weights * ((latency + per_byte * x) / t - 1)^2."""
    columns = np.stack([1 / t, x / t], axis=1) * np.sqrt(weights)[:, None]
    scale = np.abs(columns).max(axis=0)  # bytes and seconds differ by ten orders of magnitude
    target = np.sqrt(weights)
    latency, per_byte = np.linalg.lstsq(columns / scale, target, rcond=None)[0] / scale
    alone = columns.T @ target / (columns**2).sum(axis=0)
    if latency < 0:
        return 0.0, float(alone[1])
    if per_byte < 0:
        return float(alone[0]), 0.0
    return float(latency), float(per_byte)

"""What has changed on a machine since its platform file was measured: rates now against rates then."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipermoe.specs.base import Frozen
from pipermoe.specs.device import RateCurve
from pipermoe.specs.platform import Platform

TOLERATED = 0.25  # a rate that changed by more deserves a new measurement; host noise alone explains less
MESSAGE_BYTES = 2**20


class Drift(Frozen):
    """`ratio` of the rate now to the rate in the file, the median over the sizes that both have."""

    key: str
    ratio: float

    @property
    def is_large(self) -> bool:
        return not 1 - TOLERATED < self.ratio < 1 + TOLERATED


class Drifts(Frozen):
    """Every change, and how unsteady the machine was while it was measured again (`Host.noise`)."""

    changes: tuple[Drift, ...]
    noise: float | None = None


def drifts(then: Platform, now: Platform) -> tuple[Drift, ...]:
    """Every rate that both platforms measured, with its change."""
    return tuple(Drift(key=key, ratio=round(ratio, 3)) for key, ratio in (*_rates(then, now), *_costs(then, now)))


def _rates(then: Platform, now: Platform) -> Iterator[tuple[str, float]]:
    for name in ("gemm", "attention", "attention_backward"):
        for precision, curve in getattr(now.device, name).items():
            if precision in (known := getattr(then.device, name)):
                yield f"device.{name}.{precision}", _change(known[precision], curve)
    for precision, curves in now.device.grouped_gemm.items():
        known = {curve.width: curve for curve in then.device.grouped_gemm.get(precision, ())}
        for curve in curves:
            if curve.width in known:
                yield f"device.grouped_gemm.{precision} of width {curve.width}", _change(known[curve.width], curve)
    yield "device.memory_bound", _change(then.device.memory_bound, now.device.memory_bound)
    yield "host.compute_slots", now.host.compute_slots / then.host.compute_slots


def _costs(then: Platform, now: Platform) -> Iterator[tuple[str, float]]:
    known = {level.name: level for level in then.levels if level.ranks in {level.ranks for level in now.levels}}
    for level in now.levels:
        for collective, cost in level.cost.items():
            old = known[level.name].cost.get(collective) if level.name in known else None
            if old is not None:
                before, after = (c.latency_seconds + MESSAGE_BYTES / c.bandwidth_bytes_per_s for c in (old, cost))
                yield f"levels.{level.name}.cost.{collective}", before / after


def _change(then: RateCurve, now: RateCurve) -> float:
    """Rates now over rates then, at the sizes of now that lie inside then (all, if none does)."""
    sizes = np.array(now.size)
    inside = (sizes >= then.size[0]) & (sizes <= then.size[-1])
    before = np.interp(np.log(sizes), np.log(then.size), then.rate)
    ratios = np.array(now.rate) / before
    return float(np.median(ratios[inside] if inside.any() else ratios))

"""Micro-benchmarks and fits: what can this machine do? -> `Platform`."""

from pipermoe.measure.measure import measure_platform

__all__ = ["measure_platform"]

"""Reading a Platform: a curve's rate at a size, the seconds of an operation, the seconds of a collective call.

What each curve means, and against which size it was measured, is defined in `specs.platform.Device` and `LinkCost`.
"""

from __future__ import annotations

import numpy as np

from pipermoe.specs.platform import Collective, Device, Level, LinkCost, Pass, Platform, RateCurve
from pipermoe.specs.precision import RECIPES, Precision

# Elements read and written per counted element, forward and backward: used only where a platform has no measured rate
# for the pass (a datasheet). Each tensor is read or written once; the norms and the loss read their input twice.
PASS_ACCESSES: dict[Pass, tuple[float, float]] = {
    "norm": (3, 5),
    "head_norm": (3, 5),
    "residual": (3, 1),
    "rope": (2, 2),
    "swiglu": (3, 5),
    "router": (8, 8),
    "permute": (2, 2),
    "combine": (2, 3),
    "loss": (3, 2),
    "optimizer": (7, 0),
    "gradient_norm": (3, 0),
}


def rate_at(curve: RateCurve, size):
    """The achieved rate at `size`: linear in log(size), constant beyond the ends of the curve. Broadcasts."""
    return np.interp(np.log(np.maximum(size, 1e-300)), np.log(curve.size), curve.rate)


def gemm_seconds(device: Device, precision: Precision, flops):
    """Seconds of one matrix product of `flops` FLOPs."""
    return flops / rate_at(device.gemm[precision], flops)


def grouped_gemm_seconds(device: Device, precision: Precision, flops, rows_per_expert):
    """Seconds of a grouped product of `flops` FLOPs in all, in which every expert has `rows_per_expert` rows."""
    return flops / rate_at(device.grouped_gemm[precision], rows_per_expert)


def attention_seconds(device: Device, precision: Precision, flops, seq_len):
    """Forward and backward seconds of the attention core; `flops` is the full square of the forward direction."""
    forward = flops / rate_at(device.attention[precision], seq_len)
    return forward, 2 * flops / rate_at(device.attention_backward[precision], seq_len)


def pass_seconds(device: Device, precision: Precision, name: Pass, elements):
    """Forward and backward seconds of one memory-bound pass over `elements`."""
    measured = device.passes.get(precision, {}).get(name)
    if measured is None:
        forward, backward = (
            _streamed_seconds(device, RECIPES[precision].activation * accesses * elements)
            if accesses
            else 0.0 * elements
            for accesses in PASS_ACCESSES[name]
        )
        return forward, backward
    forward = elements / rate_at(measured.forward, elements)
    backward = elements / rate_at(measured.backward, elements) if measured.backward else 0.0 * elements
    return forward, backward


def _streamed_seconds(device: Device, moved_bytes):
    return moved_bytes / rate_at(device.memory_bound, moved_bytes) + device.kernel_seconds


def collective_seconds(platform: Platform, collective: Collective, group_size, span, moved_bytes, calls=1):
    """Seconds of `calls` calls that move `moved_bytes` in all, in groups of `group_size` ranks; 0 in a group of one.

    `span` is the number of consecutive ranks over which such a group is spread. The level is the innermost one whose
    blocks no group straddles: its size is a multiple of the span. Bytes are `specs.report.Traffic`'s. Broadcasts.
    """
    group_size, span, moved_bytes, calls = np.broadcast_arrays(group_size, span, moved_bytes, calls)
    seconds = np.zeros(group_size.shape)
    pending = group_size > 1
    for level in platform.levels:
        here = pending & ((level.ranks % span == 0) | (level is platform.levels[-1]))
        if here.any():
            latency, bandwidth = _group_cost(level, collective, group_size[here])
            seconds[here] = calls[here] * latency + moved_bytes[here] / bandwidth
        pending = pending & ~here
    return seconds


def _group_cost(level: Level, collective: Collective, group_size):
    """Latency and bandwidth for groups of `group_size` ranks: those of the next larger size that is listed."""
    listed = {size: cost[collective] for size, cost in level.group_cost.items() if collective in cost}
    if collective != "send":
        listed[level.ranks] = level.cost[collective]
    else:
        listed = {level.ranks: level.cost["send"]}
    sizes = sorted(listed)
    index = np.minimum(np.searchsorted(sizes, group_size), len(sizes) - 1)
    costs: list[LinkCost] = [listed[size] for size in sizes]
    latency = np.array([cost.latency_seconds for cost in costs])
    return latency[index], np.array([cost.bandwidth_bytes_per_s for cost in costs])[index]

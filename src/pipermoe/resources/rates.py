"""Reading a Platform: a curve's rate at a size, the seconds of an operation, the seconds of a collective call.

What each curve means, and against which size it was measured, is defined in `specs.device` and `specs.network`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.device import Device, GroupedCurve, Pass, RateCurve
from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.network import INSIDE_A_NODE, Collective, Level, LinkCost
from pipermoe.specs.platform import Platform
from pipermoe.specs.precision import RECIPES, Precision
from pipermoe.specs.spread import Spread

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


FP8_CAST_BYTES = 2 + 1 + 1


def rate_at(curve: RateCurve, size):
    """The achieved rate at `size`: linear in log(size), constant beyond the ends of the curve. Broadcasts."""
    return np.interp(np.log(np.maximum(size, 1e-300)), np.log(curve.size), curve.rate)


def gemm_seconds(device: Device, precision: Precision, flops):
    """Seconds of one matrix product of `flops` FLOPs."""
    return flops / rate_at(known(device, "gemm", precision), flops)


def grouped_gemm_seconds(device: Device, precision: Precision, flops, rows_per_expert, width):
    """Seconds of a grouped product of `flops` FLOPs in all over experts of `rows_per_expert` rows and `width`."""
    return flops / grouped_rate_at(known(device, "grouped_gemm", precision), rows_per_expert, width)


def grouped_rate_at(curves: Sequence[GroupedCurve], rows_per_expert, width):
    """The rate at rows and width: between the curves of two widths linear in log(width). Broadcasts."""
    widths = np.log([curve.width for curve in curves])
    place = np.interp(np.log(width), widths, np.arange(len(curves), dtype=float))
    # Each curve weighs by its closeness: 1 at its own width, 0 from its neighbours' on.
    return sum(
        np.maximum(0.0, 1 - np.abs(place - position)) * rate_at(curve, rows_per_expert)
        for position, curve in enumerate(curves)
    )


def known(
    device: Device, curves: Literal["gemm", "grouped_gemm", "attention", "attention_backward"], precision: Precision
):
    """The device's curve for a precision; fp16 runs at the rate of bf16. UserError where there is none."""
    listed = getattr(device, curves)
    if precision == "fp16" and "bf16" in listed:
        precision = "bf16"
    if precision not in listed:
        rule = f"has no curve for {precision}; it has {', '.join(listed)}"
        raise UserError(describe_value(device.name, f"device.{curves}", precision, rule))
    return listed[precision]


def attention_seconds(device: Device, precision: Precision, flops, seq_len, head_size):
    """Forward and backward seconds of the attention core; `flops` is the full square of the forward direction."""
    share = rate_at(device.attention_head_sizes, head_size) if device.attention_head_sizes else 1.0
    forward = flops / (share * rate_at(known(device, "attention", precision), seq_len))
    return forward, 2 * flops / (share * rate_at(known(device, "attention_backward", precision), seq_len))


def cast_seconds(device: Device, precision: Precision, elements):
    """Seconds of writing `elements` in the precision of products, where that is not the one of activations.

    fp8 with scales by blocks: 2 bytes are read, and one written for each of the two directions in which products read
    the tensor (Transformer Engine's MXFP8 recipe; arXiv 2603.07685, section 6).
    """
    if precision != "fp8":
        return 0.0 * elements
    return _streamed_seconds(device, FP8_CAST_BYTES * elements)


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


def collective_seconds(platform: Platform, collective: Collective, spread: Spread, moved_bytes, calls=1):
    """Seconds of `calls` calls that move `moved_bytes` in all, in groups of so many ranks; 0 in a group of one.

    The level is the innermost one whose blocks no group straddles: its size is a multiple of the group's span. Bytes
    are `specs.report.Traffic`'s. Broadcasts.
    """
    pending, span = (spread.ranks > 1) & (calls > 0), spread.span
    group_size, moved_bytes, calls, pending = np.broadcast_arrays(spread.ranks, moved_bytes, calls, pending)
    seconds = np.zeros(pending.shape)
    if not pending.any():
        return seconds
    shared = [np.broadcast_to(spread.inside(level.ranks), pending.shape) for level in platform.levels]
    for index, level in enumerate(platform.levels):
        meets = (level.ranks % span == 0) | (level is platform.levels[-1])
        here = pending & meets
        if here.any():
            size, moved, count = group_size[here], moved_bytes[here], calls[here]
            if level.link is None:
                seconds[here] = _measured_seconds(level, collective, size, moved, count)
            else:
                seconds[here] = _described_seconds(
                    platform, collective, size, [members[here] for members in shared[:index]], moved, count
                )
        pending = pending & ~meets
    return seconds


def level_send_seconds(platform: Platform, index: int, sent_bytes):
    """Seconds of one message of `sent_bytes` between two ranks that meet on level `index`, while all ranks send."""
    level = platform.levels[index]
    if level.link is None:
        cost = level.cost["send"]
        return cost.latency_seconds + sent_bytes / cost.bandwidth_bytes_per_s
    rate = level.link.collectives.get("send")
    latency, share = (rate.latency_seconds, rate_at(rate, sent_bytes)) if rate else (level.link.latency_seconds, 1.0)
    return latency + sent_bytes / (platform.port_bytes_per_s(index) * share)


def _measured_seconds(level: Level, collective: Collective, group_size, moved_bytes, calls):
    """Latency and bandwidth for groups of `group_size` ranks: those of the next larger size that is listed."""
    listed = {size: cost[collective] for size, cost in level.group_cost.items() if collective in cost}
    listed[level.ranks] = level.cost[collective]
    sizes = sorted(listed)
    index = np.minimum(np.searchsorted(sizes, group_size), len(sizes) - 1)
    costs: list[LinkCost] = [listed[size] for size in sizes]
    latency = np.array([cost.latency_seconds for cost in costs])
    return calls * latency[index] + moved_bytes / np.array([cost.bandwidth_bytes_per_s for cost in costs])[index]


def _described_seconds(
    platform: Platform, collective: Collective, group_size, shared: Sequence[NDArray], moved_bytes, calls
):
    """Seconds from the links of the levels on which the group meets: all carry their part at once, the slowest counts.

    `shared[i]` members share a block of level i; on the level behind the last of them all of the group meet.
    """
    per_call = moved_bytes / np.maximum(calls, 1)
    slowest = latency = np.zeros(group_size.shape)
    members = np.ones(group_size.shape)
    for index, level in enumerate(platform.levels[: len(shared) + 1]):
        link = level.link
        if link is None:
            raise UserError(describe_value(platform.name, f"levels.{level.name}.cost", "measured", MIXED_LEVELS))
        inside = members
        members = shared[index] if index < len(shared) else group_size
        reach = members if link.topology in INSIDE_A_NODE else group_size  # NICs carry what goes farther, too
        carried = sent_share(collective, group_size, inside, reach) * per_call
        rate = link.collectives.get(collective)
        share = rate_at(rate, carried) if rate else 1.0
        slowest = np.maximum(slowest, carried / (platform.port_bytes_per_s(index) * share))
        start = (
            rate.latency_seconds + rate.latency_per_rank_seconds * (group_size - 1) if rate else link.latency_seconds
        )
        latency = np.where(carried > 0, np.maximum(latency, start), latency)
    return calls * (latency + slowest)


def sent_share(collective: Collective, group_size, inside, reach):
    """The part of a call's bytes that one rank sends to ranks outside its block of `inside` members, within `reach`.

    All-to-all: of the bytes that leave the rank, those to (reach - inside) of its (group_size - 1) peers. All-gather
    and reduce-scatter as rings: a block of m members takes in what it lacks, (1 - m / group_size) of the whole, through
    m ports; all-reduce does both (Patarasuk and Yuan 2009). A message goes to one rank, the farthest.
    """
    if collective == "all_to_all":
        return (reach - inside) / np.maximum(group_size - 1, 1)
    if collective == "send":
        return np.where((inside < group_size) & (reach == group_size), 1.0, 0.0)
    ring = np.where(reach > inside, (1 - inside / group_size) / inside, 0.0)
    return 2 * ring if collective == "all_reduce" else ring


MIXED_LEVELS = "a described level (link) stands on levels that are described as well; give this one a link, too"

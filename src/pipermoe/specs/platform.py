"""Platform: what a machine can do, described well enough to predict training on it. Every number has its evidence."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipermoe.specs.base import Frozen
from pipermoe.specs.precision import Precision
from pipermoe.specs.units import Bytes, BytesPerSecond, FlopsPerSecond, Seconds

Collective = Literal["send", "all_to_all", "all_reduce", "all_gather", "reduce_scatter"]
COLLECTIVES: tuple[Collective, ...] = ("send", "all_to_all", "all_reduce", "all_gather", "reduce_scatter")

# Memory-bound work by what it is; the elements that count are in the comment.
Pass = Literal[
    "norm",
    "head_norm",
    "residual",
    "rope",
    "swiglu",
    "router",
    "permute",
    "combine",
    "loss",
    "optimizer",
    "gradient_norm",
]
PASSES: tuple[Pass, ...] = (
    "norm",  # RMSNorm of the stream: tokens x hidden
    "head_norm",  # RMSNorm of every query or key head: tokens x heads x head_dim
    "residual",  # adding a branch to the stream: tokens x hidden
    "rope",  # rotating queries or keys: tokens x heads x head_dim
    "swiglu",  # silu(gate) * up: rows x expert_width (one half of the gate_up output)
    "router",  # softmax, top-k, normalising, sorting by expert: tokens x top_k
    "permute",  # gathering rows for the all-to-all or sorting them by expert: rows x hidden
    "combine",  # weighting rows and adding them up per token: rows x hidden
    "loss",  # cross-entropy of logits: tokens x vocab_size
    "optimizer",  # one AdamW update: parameters
    "gradient_norm",  # norm and scaling of gradients: parameters
)


class Evidence(Frozen):
    """Where a number comes from. `kind` says how far to trust it."""

    kind: Literal["measured", "fitted", "datasheet", "assumed"]
    source: str
    date: str = ""
    software: str = ""
    residual: float | None = Field(default=None, description="relative RMS error of a fit")


class RateCurve(Frozen):
    """An achieved rate against a problem size: linear in the logarithm of the size, constant beyond the ends."""

    size: tuple[PositiveFloat, ...]
    rate: tuple[PositiveFloat, ...]

    @model_validator(mode="after")
    def _is_a_curve(self) -> RateCurve:
        if len(self.size) != len(self.rate) or not self.size:
            raise ValueError("size and rate must be lists of the same length, at least 1")
        if any(a >= b for a, b in pairwise(self.size)):
            raise ValueError("size must ascend")
        return self


class PassRate(Frozen):
    """Elements/s of one kind of memory-bound work against its elements, in the forward and in the backward direction.

    Seconds of one pass over n elements = n / rate(n). Launching its kernels and autograd's bookkeeping are included.
    """

    forward: RateCurve
    backward: RateCurve | None = Field(default=None, description="none where there is no gradient (optimizer, norm)")


class Device(Frozen):
    """One rank's device: an accelerator, or on a CPU one process with one thread. Rates are those of a rank alone.

    Seconds of one operation = its work / rate(its size). Every curve includes the fixed cost of its own calls.

    - `gemm`: FLOP/s of one matrix product against its FLOPs; the mean over y = x W, dx = dy W', dW = x' dy.
    - `grouped_gemm`: FLOP/s of one expert's products (the same three forms) against that expert's rows. A grouped
      product takes the sum over its experts of FLOPs / rate(rows): so skew is priced by the rows of each expert.
    - `attention`, `attention_backward`: FLOP/s of the causal attention core against the sequence length. The FLOPs are
      the full square, 4 x tokens x seq_len x heads x head_dim forward and twice that backward
      (`resources.flops.LayerFlops.attention_core` with causal=False), whatever the kernel skips or recomputes.
    - `memory_bound`: bytes/s of element-wise operations against the bytes that one operation reads and writes
      (caches make it a curve). For work that `passes` does not name, and for a datasheet the only figure: one point.
    - `passes`: elements/s of named memory-bound work (`Pass`). Empty on a datasheet: then use bytes and `memory_bound`.
    - `kernel_seconds`: issuing one operation on a tiny tensor, autograd's share included. Add it per operation that
      is priced by `memory_bound`; curves and passes hold it already.
    - `layer_forward_seconds`, `layer_backward_seconds`: what one layer costs beyond the sum of its curves, whatever its
      size: operations in turn find cold code where repeated ones find warm. Add once per layer and direction (a
      recomputed layer's forward again). 0 on a datasheet.
    - `peak_flops_per_s`: the basis of utilisation (MFU); measured platforms give the fastest product seen.
    """

    name: str
    memory_bytes: Bytes = Field(gt=0)
    peak_flops_per_s: dict[Precision, Annotated[FlopsPerSecond, Field(gt=0)]]
    gemm: dict[Precision, RateCurve]
    grouped_gemm: dict[Precision, RateCurve]
    attention: dict[Precision, RateCurve]
    attention_backward: dict[Precision, RateCurve]
    memory_bound: RateCurve
    passes: dict[Precision, dict[Pass, PassRate]] = {}
    kernel_seconds: Seconds = Field(ge=0)
    layer_forward_seconds: Seconds = Field(default=0.0, ge=0)
    layer_backward_seconds: Seconds = Field(default=0.0, ge=0)


class LinkCost(Frozen):
    """Seconds of one call = `latency_seconds` + bytes / `bandwidth_bytes_per_s`.

    Bytes are what `specs.report.Traffic` counts for one rank: send and all-to-all the bytes that leave the rank (in an
    uneven all-to-all those of the busiest rank, sent or received), all-reduce the tensor, reduce-scatter the input,
    all-gather the output.
    """

    latency_seconds: Seconds = Field(ge=0)
    bandwidth_bytes_per_s: BytesPerSecond = Field(gt=0)


class Level(Frozen):
    """One level of the network: `ranks` consecutive ranks reach each other at these costs (innermost level first).

    `cost` holds for groups of all `ranks` of the level; "send" for any two of them. `group_cost[n]` holds for groups of
    n < `ranks` members anywhere inside the level, all such groups at work at once; a size that is not listed costs what
    the next larger listed one does.
    """

    name: str
    ranks: PositiveInt
    cost: dict[Collective, LinkCost]
    group_cost: dict[PositiveInt, dict[Collective, LinkCost]] = {}

    @model_validator(mode="after")
    def _all_collectives(self) -> Level:
        missing = [name for name in COLLECTIVES if name not in self.cost]
        if missing:
            raise ValueError(f"cost is missing for {', '.join(missing)}")
        too_large = [size for size in self.group_cost if size >= self.ranks]
        if too_large:
            raise ValueError(f"group_cost sizes {too_large} must be below ranks = {self.ranks}")
        return self


class Host(Frozen):
    """What the ranks of one host share. `compute_slots` ranks compute at full rate at the same time; more share them.

    On a machine with a device per rank `compute_slots` equals `ranks`; on 2 cores with 4 ranks it is about 2. While n
    of a host's ranks compute, each advances at min(1, compute_slots / n) of the device's rates (processor sharing).
    `noise` is how unsteady the machine was while it was measured: the 90th less the 10th percentile of a fixed kernel's
    time over the run, relative to its median. Above 0.2 do not expect predictions to hold within 10 %.
    """

    ranks: PositiveInt
    compute_slots: PositiveFloat
    noise: float | None = Field(default=None, ge=0)


class Platform(Frozen):
    """A machine: one kind of device, the levels of its network, and the evidence for each of its numbers.

    `evidence` maps a dotted key ("device.gemm", "levels.node.cost.all_to_all") to where everything below it comes from.
    """

    name: str
    source: str = ""
    device: Device
    host: Host
    levels: tuple[Level, ...] = Field(min_length=1)
    reserved_bytes: Bytes = Field(default=0, ge=0, description="kept by the framework, not available to tensors")
    software: dict[str, str] = {}
    evidence: dict[str, Evidence] = {}

    @model_validator(mode="after")
    def _levels_grow(self) -> Platform:
        sizes = [level.ranks for level in self.levels]
        if any(inner >= outer for inner, outer in pairwise(sizes)):
            raise ValueError(f"levels must grow from the innermost: ranks = {sizes}")
        return self

    def evidence_for(self, key: str) -> Evidence | None:
        """The evidence of the longest recorded prefix of the dotted `key`."""
        parts = key.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((self.evidence[prefix] for prefix in prefixes if prefix in self.evidence), None)

"""Platform: what a machine can do, described well enough to predict training on it. Every number has its evidence."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipermoe.specs.base import Frozen
from pipermoe.specs.train import Precision
from pipermoe.specs.units import Bytes, BytesPerSecond, FlopsPerSecond, Seconds

Collective = Literal["send", "all_to_all", "all_reduce", "all_gather", "reduce_scatter"]
COLLECTIVES: tuple[Collective, ...] = ("send", "all_to_all", "all_reduce", "all_gather", "reduce_scatter")


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


class Device(Frozen):
    """One rank's device: an accelerator, or on a CPU one process with one thread.

    `gemm` is FLOP/s against the FLOPs of one matrix product; `grouped_gemm` is FLOP/s against tokens per expert;
    `attention` is FLOP/s of the attention core (forward and backward together) against the sequence length;
    `memory_bound` is bytes/s of element-wise work; `kernel_seconds` the fixed cost of launching one operation.
    """

    name: str
    memory_bytes: Bytes = Field(gt=0)
    peak_flops_per_s: dict[Precision, FlopsPerSecond]
    gemm: dict[Precision, RateCurve]
    grouped_gemm: dict[Precision, RateCurve]
    attention: dict[Precision, RateCurve]
    memory_bound_bytes_per_s: BytesPerSecond = Field(gt=0)
    kernel_seconds: Seconds = Field(ge=0)


class LinkCost(Frozen):
    """Time of one call = `latency_seconds` + bytes that one rank sends / `bandwidth_bytes_per_s`."""

    latency_seconds: Seconds = Field(ge=0)
    bandwidth_bytes_per_s: BytesPerSecond = Field(gt=0)


class Level(Frozen):
    """One level of the network: `ranks` consecutive ranks reach each other at these costs (innermost level first)."""

    name: str
    ranks: PositiveInt
    cost: dict[Collective, LinkCost]

    @model_validator(mode="after")
    def _all_collectives(self) -> Level:
        missing = [name for name in COLLECTIVES if name not in self.cost]
        if missing:
            raise ValueError(f"cost is missing for {', '.join(missing)}")
        return self


class Host(Frozen):
    """What the ranks of one host share. `compute_slots` ranks compute at full rate at the same time; more share them.

    On a machine with a device per rank `compute_slots` equals `ranks`; on 2 cores with 4 ranks it is about 2.
    """

    ranks: PositiveInt
    compute_slots: PositiveFloat


class Platform(Frozen):
    """A machine: one kind of device, the levels of its network, and the evidence for each of its numbers.

    `evidence` maps a dotted key ("device.gemm", "levels.node.cost.all_to_all") to where everything below it comes from.
    """

    schema_version: Literal[1] = 1
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

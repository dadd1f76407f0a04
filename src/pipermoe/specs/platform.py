"""Platform: what a machine can do, described well enough to predict training on it. Every number has its evidence."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipermoe.specs.base import Frozen
from pipermoe.specs.device import Device
from pipermoe.specs.network import Level, links_per_rank
from pipermoe.specs.precision import Precision
from pipermoe.specs.units import Bytes, Seconds


class Evidence(Frozen):
    """Where a number comes from. `kind` says how far to trust it."""

    kind: Literal["measured", "fitted", "datasheet", "assumed"]
    source: str
    date: str = ""
    software: str = ""
    residual: float | None = Field(default=None, description="relative RMS error of a fit")


class Host(Frozen):
    """What the ranks of one host share. `compute_slots` ranks compute at full rate at the same time; more share them.

    On a machine with a device per rank `compute_slots` equals `ranks`; on 2 cores with 4 ranks it is about 2. While n
    of a host's ranks compute, each advances at min(1, compute_slots / n) of the device's rates (processor sharing).
    Where ranks share cores, these also carry the messages between them. `meeting_seconds[n]` is what a collective among
    n ranks then takes beyond its `LinkCost` when every rank comes from computing: threads wait for a core that others
    use, and come back to cold caches. A size that is not listed takes what the next larger listed one does, or the
    largest. `noise` is how unsteady the machine was while it was measured: the 90th less the 10th percentile of a fixed
    kernel's time over the run, relative to its median. Above 0.2 do not expect predictions to hold within 10 %.
    """

    ranks: PositiveInt
    compute_slots: PositiveFloat
    meeting_seconds: dict[PositiveInt, Annotated[Seconds, Field(ge=0)]] = {}
    noise: float | None = Field(default=None, ge=0)

    @property
    def rank_share(self) -> float:
        """The part of a core that each rank has while all of a host compute."""
        return min(1.0, self.compute_slots / self.ranks)


class Platform(Frozen):
    """A machine: one kind of device, the levels of its network, and the evidence for each of its numbers.

    `levels` go from the innermost outwards; each holds whole blocks of the one before, the outermost all ranks.

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
        for inner, outer in pairwise(self.levels):
            if outer.link is not None and outer.ranks % inner.ranks:
                raise ValueError(f"level {outer.name}: ranks = {outer.ranks} must hold whole blocks of {inner.ranks}")
        if sizes[-1] < self.host.ranks:
            raise ValueError(f"a level is missing: host.ranks = {self.host.ranks}, and levels reach {sizes[-1]} ranks")
        return self

    @property
    def memory_budget_bytes(self) -> int:
        """What tensors of one rank may take."""
        return self.device.memory_bytes - self.reserved_bytes

    @property
    def usual_precision(self) -> Precision:
        """What a job computes in that does not say: bf16 where the device is faster in it than in fp32."""
        peaks = self.device.peak_flops_per_s
        return "bf16" if peaks.get("bf16", 0.0) > peaks.get("fp32", 0.0) else "fp32"

    def port_bytes_per_s(self, index: int) -> float:
        """What one rank sends through the described level `index` while all ranks do."""
        level, inner = self.levels[index], self.levels[index - 1].ranks if index else 1
        assert level.link is not None
        link = level.link
        ports = links_per_rank(link.links, level.ranks, inner) if link.links else 1 / link.shared_by
        return link.bandwidth_bytes_per_s * link.taper * ports

    def evidence_for(self, key: str) -> Evidence | None:
        """The evidence of the longest recorded prefix of the dotted `key`."""
        parts = key.split(".")
        prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((self.evidence[prefix] for prefix in prefixes if prefix in self.evidence), None)

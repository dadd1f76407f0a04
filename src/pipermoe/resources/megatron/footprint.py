"""The memory of every pipeline rank of a Megatron job, as a record that can be shown and written."""

from __future__ import annotations

from dataclasses import asdict

from pipermoe.resources.megatron.job import Machine, MegatronJob
from pipermoe.resources.megatron.peak import peak_memory
from pipermoe.specs.base import Frozen


class RankMemory(Frozen):
    """Bytes of one pipeline rank: between steps by term, and what its peak has on top of them."""

    pipeline_rank: int
    static: dict[str, float]
    activations: float
    transient: float
    peak: float

    @property
    def static_total(self) -> float:
        return sum(self.static.values())


class MegatronFootprint(Frozen):
    """All pipeline ranks of a job. `undescribed`: arguments given whose memory is not in these numbers."""

    ranks: tuple[RankMemory, ...]
    undescribed: tuple[str, ...] = ()

    @property
    def largest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak)


def footprint(job: MegatronJob, machine: Machine, undescribed: tuple[str, ...] = ()) -> MegatronFootprint:
    """The memory of every pipeline rank of `job`."""
    ranks = []
    for rank in range(job.strategy.pipeline_parallel):
        peak = peak_memory(job, machine, rank)
        ranks.append(
            RankMemory(
                pipeline_rank=rank,
                static=asdict(peak.static),
                activations=peak.activations,
                transient=peak.transient,
                peak=peak.total,
            )
        )
    return MegatronFootprint(ranks=tuple(ranks), undescribed=undescribed)

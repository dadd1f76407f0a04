"""The process groups in which one rank communicates: specs/mesh.py made real with torch.distributed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from pipermoe.specs.errors import UserError
from pipermoe.specs.mesh import Axis, Coordinates, coordinates, group_of
from pipermoe.specs.strategy import Strategy


@dataclass(frozen=True, slots=True)
class ProcessGroups:
    """Where this rank stands and whom it talks to.

    `pp` lists the global ranks of this rank's pipeline, first stage first; `pipeline` is their group for messages to
    later ranks, `pipeline_back` for those to earlier ones. `stage` holds all ranks of one pipeline stage, `ends` the
    first and the last of a pipeline (who stands between is alone). `ep_inside` shares copies of tokens, `ep_across` is
    how they come there (specs/mesh.py). Every group exists, also with one member, so none is
    ever None.
    """

    rank: int
    coordinates: Coordinates
    pp: tuple[int, ...]
    pipeline: dist.ProcessGroup
    pipeline_back: dist.ProcessGroup
    dp: dist.ProcessGroup
    edp: dist.ProcessGroup
    ep: dist.ProcessGroup
    ep_across: dist.ProcessGroup
    ep_inside: dist.ProcessGroup
    stage: dist.ProcessGroup
    ends: dist.ProcessGroup
    world: dist.ProcessGroup

    @classmethod
    def create(cls, strategy: Strategy, timeout: timedelta | None = None) -> ProcessGroups:
        """The groups of this rank. Collective: every rank of the world calls it once, after init_process_group.

        `timeout` applies to every collective of the groups (torch's default, which is half an hour, if not given).
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if world_size != strategy.world_size:
            raise UserError(f"the strategy needs {strategy.world_size} ranks, this run has {world_size}")

        def group(axis: Axis) -> dist.ProcessGroup:
            # Local synchronisation: only members meet, so that a rank of thousands creates its own groups and no other.
            members = list(group_of(strategy, axis, rank))
            created = dist.new_group(members, timeout=timeout, use_local_synchronization=True, group_desc=axis)
            assert isinstance(created, dist.ProcessGroup)
            return created

        pipeline, ep = group("pp"), group("ep")
        return cls(
            rank=rank,
            coordinates=coordinates(strategy, rank),
            pp=group_of(strategy, "pp", rank),
            pipeline=pipeline,
            pipeline_back=group("pp") if dist.get_backend() == "nccl" else pipeline,
            dp=group("dp"),
            edp=group("edp"),
            ep=ep,
            ep_across=group("ep_across") if strategy.ranks_per_copy > 1 else ep,
            ep_inside=group("ep_inside"),
            stage=group("stage"),
            ends=group("ends"),
            world=_world(),
        )

    def messages(self, sender: int, receiver: int) -> dist.ProcessGroup:
        """The group in which two global ranks of this pipeline send in this direction."""
        return self.pipeline if self.pp.index(sender) < self.pp.index(receiver) else self.pipeline_back


def axis_of(group: dist.ProcessGroup) -> str:
    """The axis a group was created for, as traffic is keyed: "pp", "dp", "edp", "ep", "stage" and so on, or "world"."""
    return "world" if group.group_desc == "default_pg" else group.group_desc


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world

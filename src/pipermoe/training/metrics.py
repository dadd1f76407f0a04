"""What one step says of itself: exact values of the whole job, equal on every rank, and how its experts were loaded.

L layers that route, E experts, P ranks
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipermoe.modules.model import MoELayer
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.training.measurement import StepSeconds


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The losses and the gradient norm of one step of the whole job, and this rank's times.

    `dropped` is the share of choices beyond their experts' capacity. `skipped`: loss or gradient were not finite, and
    the weights stayed what they were.
    """

    loss: float
    mtp_loss: float
    auxiliary: float
    z_loss: float
    dropped: float
    grad_norm: float
    rate: float
    timing: StepSeconds
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class StepCensus:
    """Over all ranks: for each layer that routes the load of the busiest expert over the mean, and how many experts had
    no token at all.

    `load_LE` are the tokens of every expert; `rank_load`, of a run with a layout, is for each layer the rows of the
    busiest rank of a group over the mean, over micro-batches; `spilled` counts copies for one micro-batch alone.
    `resident_bytes` is the largest memory of a rank's process, or on a GPU of
    its allocator's peak.
    """

    load_LE: NDArray[np.int64]
    expert_load: tuple[float, ...]
    dead_experts: tuple[int, ...]
    rank_load: tuple[float, ...] | None
    spilled: int
    resident_bytes: int


def take_census(engine: Engine, groups: ProcessGroups) -> StepCensus:
    """Sum what every rank has counted in the last step. Collective over the world, on every rank the same."""
    resident_P = np.zeros(groups.world.size())
    resident_P[groups.rank] = _resident_bytes(engine.device)
    tally, choices_LE = engine.tally, _choices(engine).cpu().numpy()
    spilled_1 = np.array([tally.spilled / groups.ep.size()])  # every rank of the group counts the same copies
    counts_LE, busiest_L, mean_L, spilled_1, resident_P = _summed(
        (choices_LE, tally.busiest_L, tally.mean_L, spilled_1, resident_P), engine.device, groups.world
    )
    return StepCensus(
        load_LE=counts_LE.astype(np.int64),
        expert_load=tuple((counts_LE.max(1) / counts_LE.mean(1)).tolist()),
        dead_experts=tuple((counts_LE == 0).sum(1).tolist()),
        rank_load=tuple((busiest_L / mean_L).tolist()) if engine.placement is not None else None,
        spilled=round(spilled_1.item()),
        resident_bytes=int(resident_P.max()),
    )


def _summed(
    parts: Sequence[NDArray[np.float64]], device: torch.device, group: dist.ProcessGroup
) -> list[NDArray[np.float64]]:
    """Each of `parts` summed over the ranks of `group`, all in one collective."""
    whole = torch.from_numpy(np.concatenate([part.ravel() for part in parts])).to(device)
    dist.all_reduce(whole, group=group)
    ends = np.cumsum([part.size for part in parts])[:-1]
    sums = np.split(whole.cpu().numpy(), ends)
    return [total.reshape(part.shape) for total, part in zip(sums, parts, strict=True)]


def _choices(engine: Engine) -> Tensor:
    """How often this rank's tokens chose each expert (L, E), float64; zero in the layers of other ranks."""
    layers = engine.model.routers
    counts_LE = torch.zeros(len(layers), engine.model.moe.num_experts, dtype=torch.float64, device=engine.device)
    for stage in engine.stages.values():
        for name, layer in stage.model.layers.items():
            if isinstance(layer, MoELayer):
                counts_LE[layers.index(int(name))] = engine.balance.chosen(layer.router).double()
    return counts_LE


def _resident_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return 0

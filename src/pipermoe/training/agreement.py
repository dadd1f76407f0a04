"""Whether all ranks run the same job, found out before the first message whose size depends on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist

import pipermoe
from pipermoe.schedule.action import Schedule
from pipermoe.specs.errors import UserError
from pipermoe.specs.model import ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig


def check_same_job(
    model: ModelSpec,
    train: TrainConfig,
    strategy: Strategy,
    schedule: Schedule,
    text: str = "",
    device: torch.device | str = "cpu",
) -> None:
    """Raise `UserError` on every rank, naming what differs and where, unless all ranks of the world run the same job.

    `text` tells texts apart. Collective over the world, before any other group exists: ranks of different shapes would
    wait for each other, or abort inside gloo.
    """
    check_equal(
        {
            "the model": model.model_dump_json(),
            "the training job": train.model_dump_json(),
            "the strategy": strategy.model_dump_json(),
            "the schedule": f"{schedule.stage_rank}\n{schedule}",
            "the text": text,
            "the version of pipermoe": pipermoe.__version__,
            "the version of torch": torch.__version__,
        },
        device,
    )


def check_equal(parts: Mapping[str, str], device: torch.device | str = "cpu") -> None:
    """Raise `UserError` on every rank unless each of `parts` is the same on all; only digests travel."""
    own = torch.tensor([_digest(text) for text in parts.values()], device=device)
    world_size = dist.get_world_size()
    everyone = [torch.empty_like(own) for _ in range(world_size)]
    dist.all_gather(everyone, own)
    digests = [each.tolist() for each in everyone]
    for i, name in enumerate(parts):
        odd = [rank for rank in range(world_size) if digests[rank][i] != digests[0][i]]
        if odd:
            ranks = ", ".join(map(str, odd[:8])) + (" and more" if len(odd) > 8 else "")
            raise UserError(f"{name} of ranks {ranks} differs from that of rank 0: start all ranks with the same files")


def _digest(text: str) -> int:
    """63 bits of SHA-256, as an int64 holds them."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

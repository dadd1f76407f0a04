"""What ranks tell each other when an Exchange is made: JSON as bytes in tensors, nothing that could run."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def gather_values(group: dist.ProcessGroup, mine: Any) -> list[Any]:
    """The value of every rank, each anything that JSON holds. A collective call."""
    text = np.frombuffer(json.dumps(mine).encode(), dtype=np.uint8)
    lengths = _gather(group, torch.tensor([len(text)]))
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
    padded[: len(text)] = torch.from_numpy(text.copy())
    rows = _gather(group, padded)
    return [json.loads(bytes(row[: int(length)].numpy())) for row, length in zip(rows, lengths, strict=True)]


def _gather(group: dist.ProcessGroup, mine: torch.Tensor) -> list[torch.Tensor]:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    rows = [torch.empty_like(mine, device=device) for _ in range(group.size())]
    dist.all_gather(rows, mine.to(device), group=group)
    return [row.cpu() for row in rows]

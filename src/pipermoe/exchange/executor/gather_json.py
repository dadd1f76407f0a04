"""Small plain values between ranks as JSON in byte tensors: what arrives can be wrong, but it cannot run code.

B bytes of the longest message, P ranks
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


def all_gather_json(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """What every rank of `group` gave, in rank order, on every rank. Collective.

    `value` is anything that `json` writes; dictionaries come back with strings for keys, tuples as lists.
    """
    device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
    message = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    lengths_P = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    dist.all_gather(lengths_P, torch.tensor([message.numel()], device=device), group=group)
    lengths = [int(length) for length in lengths_P]
    padded_B = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded_B[: message.numel()] = message
    messages = [torch.empty_like(padded_B) for _ in lengths]
    dist.all_gather(messages, padded_B, group=group)
    return [json.loads(bytes(each[:n].tolist())) for each, n in zip(messages, lengths, strict=True)]

"""Initial weights by name: the same values for every arrangement of ranks.

Each parameter is drawn from a generator seeded by (seed, global name), each expert by its logical id, so that a rank
draws the layers and experts that it holds and no others.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pipermoe.layout.expert_layout import EMPTY
from pipermoe.modules.names import expert_name, is_expert

INITIAL_STD = 0.02  # GPT-2 (Radford et al. 2019); projections into the residual stream are divided by sqrt(2 L)


@torch.no_grad()
def initialize(
    parameters: Iterable[tuple[str, Tensor]],
    experts_of: Callable[[str], Iterable[int]] = lambda name: itertools.count(),
    *,
    seed: int,
    num_layers: int,
) -> None:
    """Fill (global name, parameter) pairs in place: norms with ones, biases and sinks with zeros, matrices at random.

    Expert parameters are (slots, in, out); `experts_of(name)` are the logical experts in those slots, or `EMPTY`.
    """
    for name, parameter in parameters:
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif name.endswith((".bias", ".sinks")):
            parameter.zero_()
        elif is_expert(name):
            for slot, expert in zip(parameter, experts_of(name), strict=False):
                if expert == EMPTY:
                    slot.zero_()
                else:
                    slot.copy_(_draw(seed, expert_name(name, expert), slot, _std(name, num_layers)))
        else:
            parameter.copy_(_draw(seed, name, parameter, _std(name, num_layers)))


def _std(name: str, num_layers: int) -> float:
    into_residual = name.endswith((".output.weight", ".down.weight"))
    return INITIAL_STD / math.sqrt(2 * num_layers) if into_residual else INITIAL_STD


def _draw(seed: int, name: str, like: Tensor, std: float) -> Tensor:
    """A normal draw on the CPU in fp32, whatever the device and precision of `like`, so that all of them agree."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    return torch.empty(like.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)

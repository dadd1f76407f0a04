"""The global gradient norm, exact for every arrangement, and clipping by it.

Every parameter of the model must count once, though a dense one has a copy on every rank of dp, a routed expert on
every rank of edp, and the embedding perhaps on both ends of the pipeline. Each rank therefore counts only the slice
that it owns of each flat buffer (slices of the copies' group, disjoint by construction, sharded or not), the last stage
nothing of its copy, and the sum over all ranks is the sum over all parameters.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipermoe.runtime.optimizer.flat_parameters import FlatParameters

# One fp32 norm over millions of elements is off by 1e-4; over this many by 1e-7. The squares are added in fp64.
ELEMENTS_PER_NORM = 2**14


def owned_squared_norm(flats: Iterable[FlatParameters]) -> Tensor:
    """This rank's part of the squared norm, a float64 scalar: summed over all ranks it is the global one.

    Call it after the gradients are reduced.
    """
    norms = [norm for flat in flats if not flat.is_copy for norm in _norms(flat.of_owned(flat.gradients))]
    return torch.cat(norms).double().square().sum()


def _norms(values_N: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of all whole pieces, and of the rest."""
    whole = values_N.numel() // ELEMENTS_PER_NORM * ELEMENTS_PER_NORM
    pieces_PE = values_N[:whole].view(-1, ELEMENTS_PER_NORM)
    return torch.linalg.vector_norm(pieces_PE, dim=1), torch.linalg.vector_norm(values_N[whole:]).view(1)


def clip_scale(norm: float, maximum: float) -> float:
    """What gradients of global `norm` are multiplied by so that it becomes at most `maximum` (0: no clipping)."""
    return min(1.0, maximum / (norm + 1e-6)) if maximum else 1.0  # torch.nn.utils.clip_grad_norm_ adds the same 1e-6

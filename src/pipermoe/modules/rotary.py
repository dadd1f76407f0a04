"""Rotary positions (RoPE, Su et al., arXiv 2104.09864) in the half-split form, optionally stretched by YaRN.

B sequences, H heads, S positions, C numbers of a head that are rotated
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipermoe.specs.model import Attention, Yarn

Rotation = tuple[Tensor, Tensor]


def rotation_of(attention: Attention, seq_len: int, dtype: torch.dtype) -> Rotation:
    """The tables of a model's attention, of the numbers of a head that turn."""
    return rotation_tables(seq_len, attention.rotated, attention.rope_theta, dtype, attention.yarn)


def rotation_tables(
    seq_len: int, head_dim: int, theta: float, dtype: torch.dtype, yarn: Yarn | None = None
) -> Rotation:
    """Cosines and sines (S, C) of the rotary angles `position * theta ** (-2i / C)`, each twice."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if yarn is not None:
        frequency = _stretched(frequency, head_dim, theta, yarn)
    angle = torch.arange(seq_len, dtype=torch.float64)[:, None] * frequency.repeat(2)
    amplitude = 1.0 if yarn is None else yarn.amplitude
    return (angle.cos() * amplitude).to(dtype), (angle.sin() * amplitude).to(dtype)


def rotate(x_BHSN: Tensor, cosine_SC: Tensor, sine_SC: Tensor) -> Tensor:
    """The first C of the N numbers of each head turned, the others as they are."""
    turning = cosine_SC.shape[-1]
    x_BHSC, rest = x_BHSN[..., :turning], x_BHSN[..., turning:]
    low, high = x_BHSC.chunk(2, dim=-1)
    turned = x_BHSC * cosine_SC + torch.cat((-high, low), dim=-1) * sine_SC
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _stretched(frequency: Tensor, head_dim: int, theta: float, yarn: Yarn) -> Tensor:
    """YaRN's "NTK-by-parts" (Peng et al., arXiv 2309.00071, section 3.2): slow pairs are slowed, fast ones kept."""

    def pair_that_turns(times: float) -> float:
        """The index of the pair that turns this often over the original positions."""
        return head_dim * math.log(yarn.original_positions / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # all pairs on one side of the ramp
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return frequency * (1 - slowed) + frequency / yarn.factor * slowed

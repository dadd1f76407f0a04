"""The learning-rate schedule: linear warm-up, then a cosine down to the minimum (Loshchilov & Hutter 2017, SGDR)."""

from __future__ import annotations

import math

from pipermoe.specs.train import Optimizer


def learning_rate(step: int, optimizer: Optimizer, steps: int) -> float:
    """The rate of `step` (from 0) in a run of `steps`; the minimum from the last step on.

    The first step already learns: warm-up rises from peak / warmup_steps to the peak at step warmup_steps - 1.
    """
    peak, minimum, warmup = optimizer.learning_rate, optimizer.minimum_learning_rate, optimizer.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup + 1) / max(1, steps - warmup))
    return minimum + (peak - minimum) * (1 + math.cos(math.pi * progress)) / 2

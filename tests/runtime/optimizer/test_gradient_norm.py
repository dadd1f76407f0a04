"""Clipping; the norm itself needs several ranks: tests/distributed/test_optimizer.py."""

from __future__ import annotations

import pytest

from pipermoe.runtime.optimizer.gradient_norm import clip_scale


def test_clipping_shrinks_large_gradients_only_and_zero_means_none():
    assert clip_scale(10.0, 1.0) == pytest.approx(0.1)
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(1e9, 0.0) == 1.0

"""Attention with sinks where the CPU's kernel is not: plain products give what the kernel gives."""

from __future__ import annotations

import pytest
import torch

from pipermoe.modules.attention_core import _band
from pipermoe.modules.sinks import _kernel, _kernel_backward, plain_backward, plain_forward

QUERIES = 6


@pytest.mark.parametrize("window", [False, True], ids=["causal", "a window and the one before"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_plain_products_give_what_the_kernel_gives(window: bool, dtype: torch.dtype, tolerance: float):
    generator = torch.Generator().manual_seed(0)
    keys = 2 * QUERIES if window else QUERIES
    shapes = ((2, 4, QUERIES, 8), (2, 2, keys, 8), (2, 2, keys, 8), (2, 4, QUERIES, 8))
    query, key, value, gradient = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    seen = _band(QUERIES, QUERIES, query) if window else None
    out, total = _kernel(query, key, value, seen, 0.3)
    torch.testing.assert_close(plain_forward(query, key, value, seen, 0.3), (out, total), rtol=0, atol=tolerance)
    expected = _kernel_backward(gradient, query, key, value, out, total, seen, 0.3)
    found = plain_backward(gradient, query, key, value, out, total, seen, 0.3)
    torch.testing.assert_close(found, tuple(expected), rtol=tolerance, atol=2 * tolerance)

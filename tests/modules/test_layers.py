"""Each layer's own forward and backward against PyTorch's, and the weight gradient that can wait."""

from __future__ import annotations

import weakref
from typing import TypeVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipermoe.modules.experts import swiglu
from pipermoe.modules.linear import GroupedLinear, Linear
from pipermoe.modules.loss import cross_entropy
from pipermoe.modules.norm import RMSNorm
from pipermoe.modules.weight_gradients import WeightGradients

close = torch.testing.assert_close


Layer = TypeVar("Layer", bound=nn.Module)


def filled(layer: Layer) -> Layer:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer


def input_and_gradient(ours, theirs, *shape: int) -> None:
    """Both functions give the same values and the same gradient of their input."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    result, expected = ours(mine), theirs(other)
    close(result, expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    result.backward(direction)
    expected.backward(direction)
    close(mine.grad, other.grad)


def same_weight_gradients(layer: nn.Module, copies: dict[str, Tensor]) -> None:
    for name, parameter in layer.named_parameters():
        close(parameter.grad, copies[name].grad)


def copies_of(layer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in layer.named_parameters()}


def test_linear_equals_torch():
    layer = filled(Linear(5, 3, WeightGradients(), bias=True))
    w = copies_of(layer)
    input_and_gradient(layer, lambda x: F.linear(x, w["weight"], w["bias"]), 7, 5)
    same_weight_gradients(layer, w)


@settings(deadline=None, max_examples=20)
@given(rows=st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_grouped_linear_equals_a_loop_over_experts(rows: list[int]):
    layer = filled(GroupedLinear(len(rows), 4, 3, WeightGradients()))
    w = copies_of(layer)

    def loop(x: Tensor) -> Tensor:
        return torch.cat([part @ matrix for part, matrix in zip(x.split(rows), w["weight"], strict=True)])

    input_and_gradient(lambda x: layer(x, rows), loop, sum(rows), 4)
    same_weight_gradients(layer, w)


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 4, 8)])
def test_rms_norm_equals_torch(shape: tuple[int, ...]):
    layer = filled(RMSNorm(8, 1e-6, WeightGradients()))
    w = copies_of(layer)
    input_and_gradient(layer, lambda x: F.rms_norm(x, (8,), w["weight"], 1e-6), *shape)
    same_weight_gradients(layer, w)


def test_swiglu_equals_silu_times_up():
    input_and_gradient(swiglu, lambda x: F.silu(x[:, :5]) * x[:, 5:], 4, 10)


def test_cross_entropy_equals_torch():
    targets = torch.tensor([0, 3, 3, 8, 1])
    input_and_gradient(
        lambda x: cross_entropy(x.clone(), targets), lambda x: F.cross_entropy(x, targets, reduction="mean"), 5, 9
    )


def test_a_queued_weight_gradient_is_computed_when_it_is_run_and_adds_up():
    layer = filled(Linear(5, 3, WeightGradients()))
    x = torch.randn(7, 5, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    once = layer.weight.grad.clone()
    queue = []
    with layer.gradients.deferred_to(queue):
        layer(x).sum().backward()
    close(layer.weight.grad, once)
    (accumulate,) = queue
    accumulate()
    close(layer.weight.grad, 2 * once)


def test_a_waiting_weight_gradient_of_the_head_keeps_no_gradient_of_its_input():
    head, queue = filled(Linear(6, 5, WeightGradients())), []
    x = torch.randn(4, 6).requires_grad_()
    with head.gradients.deferred_to(queue):
        cross_entropy(head(x), torch.arange(4)).backward()
    assert x.grad is not None
    gradient = weakref.ref(x.grad.untyped_storage())
    assert len(queue) == 1
    del x
    assert gradient() is None

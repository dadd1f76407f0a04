"""Weight gradients: computed at once, or queued as closures and run later. The only split of backward into I and W.

Weights hang on no autograd graph: layers add their gradients themselves, through `WeightGradients.add`. So a W action
costs the weight products and nothing else: no second traversal and no recomputation (DualPipe's WeightGradStore;
zero-bubble schedules, Qi et al., arXiv 2401.10241). Gradients are fp32 whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Accumulate = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Milestone:
    """What is done when all weight gradients before it in a queue have been added, but never ahead of the schedule."""

    reached: Callable[[], None]

    def __call__(self) -> None:
        self.reached()


class WeightGradients:
    """Receives the weight-gradient closures of one stage."""

    def __init__(self) -> None:
        self._queue: list[Accumulate] | None = None

    def add(self, accumulate: Accumulate) -> None:
        """Run `accumulate` now, or queue it inside `deferred_to`."""
        if self._queue is None:
            accumulate()
        else:
            self._queue.append(accumulate)

    @contextmanager
    def deferred_to(self, queue: list[Accumulate] | None) -> Iterator[None]:
        """Collect what is added meanwhile in `queue`; None computes at once."""
        outer, self._queue = self._queue, queue
        try:
            yield
        finally:
            self._queue = outer


@torch.no_grad()
def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """`parameter.grad += gradient`."""
    gradient_of(parameter).add_(gradient)


@torch.no_grad()
def accumulate_product(parameter: Tensor, a: Tensor, b: Tensor) -> None:
    """`parameter.grad += a @ b`."""
    add_product(gradient_of(parameter), a, b)


@torch.no_grad()
def accumulate_rows(parameter: Tensor, rows_T: Tensor, gradient_TD: Tensor) -> None:
    """`parameter.grad[rows_T[t]] += gradient_TD[t]`; a row may come more than once."""
    total = gradient_of(parameter)
    total.index_add_(0, rows_T, gradient_TD.to(total.dtype))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, in place of a temporary of its size where all have one precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)  # no kernel adds a bf16 product to an fp32 total on every device


def gradient_of(parameter: Tensor) -> Tensor:
    """`parameter.grad`, made of zeros if there is none yet."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype or parameter.dtype)
    return parameter.grad

"""Mean cross-entropy over the vocabulary with one buffer of the logits' size for forward and backward.

T tokens, V vocabulary size
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Mean over T of `logsumexp(logits) - logits[target]`, in fp32, 0 where there is no target (below 0).

    Backward overwrites the logits: call it once.
    """
    return _CrossEntropy.apply(logits_TV, targets_T)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        exact_TV = logits_TV.float()
        total_T1 = exact_TV.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(exact_TV, total_T1, targets_T)
        ctx.dtype = logits_TV.dtype
        entropy_T1 = total_T1 - exact_TV.gather(1, targets_T.clamp_min(0)[:, None])
        return entropy_T1.masked_fill_(targets_T[:, None] < 0, 0.0).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits_TV, total_T1, targets_T = ctx.saved_tensors
        # Detached: a queued weight gradient that reads it must not keep the graph, and the gradients at its leaves.
        probabilities_TV = logits_TV.detach().sub_(total_T1).exp_()
        minus_one_T1 = torch.full_like(total_T1, -1.0)
        probabilities_TV.scatter_add_(1, targets_T.clamp_min(0)[:, None], minus_one_T1)
        weight_T1 = (gradient / targets_T.numel()).expand_as(total_T1).masked_fill(targets_T[:, None] < 0, 0.0)
        return probabilities_TV.mul_(weight_T1).to(ctx.dtype), None

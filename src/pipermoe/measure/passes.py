"""The memory-bound passes of a training step, as calls to time: those of modules/, or the same operations in order.

What stands in the middle of a module, or above this package, is repeated here; each names its original.
T tokens, K choices a token, R = T * K rows, E experts, D hidden size, F expert width, V vocabulary size
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipermoe.measure.clock import Call
from pipermoe.measure.kernels import Directions, Kernels, differentiable
from pipermoe.measure.sizes import Widths
from pipermoe.modules.experts import swiglu_gradient, swiglu_product
from pipermoe.modules.norm import rms_norm, rms_norm_gradients
from pipermoe.modules.rotary import rotate
from pipermoe.modules.router import count_choices
from pipermoe.specs.device import Pass

EPSILON = 1e-6
NORM_BLOCK = 2**14  # gradients are squared in blocks of this many, the blocks added in fp64


def elements(kind: Pass, tokens: int, widths: Widths) -> int:
    """How many elements a pass over `tokens` tokens counts, as `specs.platform.Pass` defines it."""
    per_token = {
        "norm": widths.hidden,
        "head_norm": widths.num_heads * widths.head_dim,
        "residual": widths.hidden,
        "rope": widths.num_heads * widths.head_dim,
        "swiglu": widths.expert_width,
        "router": widths.top_k,
        "permute": widths.top_k * widths.hidden,
        "combine": widths.top_k * widths.hidden,
        "loss": widths.vocab,
    }
    return tokens * per_token[kind]


def norm(kernels: Kernels, tokens: int, widths: Widths) -> Directions:
    """RMSNorm of the stream (modules/norm.py)."""
    return _rms_norm(kernels, kernels.random(tokens, widths.hidden), kernels.random(tokens, widths.hidden))


def head_norm(kernels: Kernels, tokens: int, widths: Widths) -> Directions:
    """RMSNorm of every head of queries or keys, which lie inside tokens (modules/attention.py)."""
    shape = (1, tokens, widths.num_heads, widths.head_dim)
    return _rms_norm(kernels, kernels.random(*shape).transpose(1, 2), kernels.random(*shape).transpose(1, 2))


def _rms_norm(kernels: Kernels, x: Tensor, gradient: Tensor) -> Directions:
    w_D, dw_D = kernels.random(x.shape[-1]), kernels.random(x.shape[-1])
    _, inverse = rms_norm(x, w_D, EPSILON)

    def backward() -> Tensor:
        to_x, to_weight_D = rms_norm_gradients(gradient, x, inverse, w_D)
        dw_D.add_(to_weight_D)
        return to_x

    return Directions(lambda: rms_norm(x, w_D, EPSILON)[0], backward)


def residual(kernels: Kernels, tokens: int, widths: Widths) -> Directions:
    """A branch joins the stream; backward, where the stream forks, the branches' gradients are added."""
    x_TD, y_TD = kernels.random(tokens, widths.hidden), kernels.random(tokens, widths.hidden)
    return Directions(lambda: x_TD + y_TD, lambda: x_TD + y_TD)


def rope(kernels: Kernels, tokens: int, widths: Widths) -> Directions:
    """Rotary positions of heads that lie inside tokens (modules/attention.py)."""
    x = kernels.random(1, tokens, widths.num_heads, widths.head_dim).transpose(1, 2).requires_grad_()
    cosine, sine = kernels.random(tokens, widths.head_dim), kernels.random(tokens, widths.head_dim)
    return differentiable(lambda: rotate(x, cosine, sine), (x,))


def swiglu(kernels: Kernels, tokens: int, widths: Widths) -> Directions:
    """silu(gate) * up with its own backward (modules/experts.py)."""
    gate_up, g_TF = kernels.random(tokens, 2 * widths.expert_width), kernels.random(tokens, widths.expert_width)
    return Directions(lambda: swiglu_product(gate_up), lambda: swiglu_gradient(g_TF, gate_up))


def router(kernels: Kernels, tokens: int, widths: Widths) -> Directions:
    """Scores to weights of the chosen experts and the balancing loss; the sort that groups rows by expert."""
    experts = widths.num_experts
    logits_TE = kernels.leaf(tokens, experts)

    def choose() -> Tensor:
        scores_TE = logits_TE.softmax(-1)
        experts_TK = scores_TE.detach().topk(widths.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        chosen_R = experts_TK.flatten()
        order_R = chosen_R.argsort(stable=True)
        torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.numel(), device=order_R.device))
        load_E = count_choices(experts_TK, experts)
        balance = experts * (load_E.to(scores_TE.dtype) / chosen_R.numel() * scores_TE.mean(0)).sum()
        return torch.cat((weights_TK.flatten(), balance[None]))

    return differentiable(choose, (logits_TE,))


def permute(kernels: Kernels, tokens: int, widths: Widths) -> Directions:
    """Rows in another order; backward is the inverse order, a gather again (runtime/pipeline/dispatch.py)."""
    y_RD = kernels.random(tokens * widths.top_k, widths.hidden)
    index_R = torch.randperm(y_RD.shape[0], device=kernels.device)
    return Directions(lambda: y_RD[index_R], lambda: y_RD[index_R])


def combine(kernels: Kernels, tokens: int, widths: Widths) -> Directions:
    """The weighted sum of what the chosen experts made of a token (modules/model.py, `merge`)."""
    y_TKD, weight_TK = kernels.leaf(tokens, widths.top_k, widths.hidden), kernels.leaf(tokens, widths.top_k)
    return differentiable(lambda: (y_TKD * weight_TK[..., None]).sum(1), (y_TKD, weight_TK))


def loss(kernels: Kernels, tokens: int, widths: Widths) -> Directions:
    """Cross-entropy whose backward overwrites the logits (modules/loss.py)."""
    logits_TV, spent_TV = kernels.random(tokens, widths.vocab), kernels.random(tokens, widths.vocab)
    target_T1 = torch.randint(widths.vocab, (tokens, 1), device=kernels.device)
    total_T1 = logits_TV.logsumexp(-1, keepdim=True)

    def forward() -> Tensor:
        return (logits_TV.logsumexp(-1, keepdim=True) - logits_TV.gather(1, target_T1)).mean()

    def backward() -> Tensor:
        probabilities_TV = torch.sub(logits_TV, total_T1, out=spent_TV).exp_()
        probabilities_TV.scatter_add_(1, target_T1, torch.full_like(total_T1, -1.0))
        return probabilities_TV.mul_(1.0 / tokens)

    return Directions(forward, backward)


TOKEN_PASSES: dict[Pass, Callable[[Kernels, int, Widths], Directions]] = {
    "norm": norm,
    "head_norm": head_norm,
    "residual": residual,
    "rope": rope,
    "swiglu": swiglu,
    "router": router,
    "permute": permute,
    "combine": combine,
    "loss": loss,
}


def optimizer(kernels: Kernels, parameters: int) -> Call:
    """One fused AdamW update of a flat buffer of `parameters` parameters (runtime/optimizer/adamw.py)."""
    weights = torch.nn.Parameter(kernels.random(parameters))
    weights.grad = kernels.random(parameters)
    return torch.optim.AdamW([weights], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True).step


def gradient_norm(kernels: Kernels, parameters: int) -> Call:
    """The exact norm of a flat buffer of `parameters` gradients, scaled and zeroed (runtime/optimizer)."""
    gradients = kernels.random(parameters)

    def run() -> None:
        blocks = gradients.split(NORM_BLOCK)
        norms = torch.stack(torch._foreach_norm(blocks))  # pyright: ignore[reportPrivateImportUsage]
        norm = norms.double().square().sum().sqrt()
        gradients.mul_(1.0 / max(1.0, float(norm)))
        gradients.zero_()

    return run

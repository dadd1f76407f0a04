"""The router: which experts a token goes to, how much each counts, and how evenly the load is spread.

T tokens, D hidden size, E experts, K choices a token
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipermoe.runtime.gradients import WeightGradients
from pipermoe.runtime.linear import Linear
from pipermoe.specs.model import ModelSpec


class Router(Linear):
    """Scores every expert for every token in fp32 and keeps the best `top_k`."""

    def __init__(self, model: ModelSpec, gradients: WeightGradients, dtype: torch.dtype):
        super().__init__(model.hidden_size, model.moe.num_experts, gradients, bias=model.moe.router.bias, dtype=dtype)
        self.spec, self.top_k = model.moe.router, model.moe.top_k

    def choose(self, x_TD: Tensor, planned_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Combine weights (T, K), load-balancing loss (scalar) and chosen experts (T, K).

        `planned_TK` are choices given as data instead of the best scores.
        """
        logits_TE = self(x_TD).float()
        scores_TE = logits_TE.softmax(-1) if self.spec.score == "softmax" else logits_TE.sigmoid()
        experts_TK = scores_TE.detach().topk(self.top_k, dim=-1).indices if planned_TK is None else planned_TK
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.spec.normalize_top_k:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        share_TE = scores_TE if self.spec.score == "softmax" else scores_TE / scores_TE.sum(-1, keepdim=True)
        auxiliary = load_balancing_loss(share_TE, experts_TK)
        return (weights_TK * self.spec.scaling_factor).to(x_TD.dtype), auxiliary, experts_TK


def load_balancing_loss(share_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """`E * sum_e f_e P_e`: 1 when balanced (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6).

    f_e is the fraction of choices that fall on expert e, P_e the mean share of the score that it gets.
    """
    load_E = count_choices(experts_TK, share_TE.shape[1]).to(share_TE.dtype) / experts_TK.numel()
    return share_TE.shape[1] * (load_E * share_TE.mean(0)).sum()


def count_choices(experts_TK: Tensor, num_experts: int) -> Tensor:
    """How many choices fall on each expert: (E,) int64. Unlike bincount its shape depends on no data."""
    choices = experts_TK.flatten()
    return torch.zeros(num_experts, dtype=torch.int64, device=choices.device).scatter_add_(
        0, choices, torch.ones_like(choices)
    )

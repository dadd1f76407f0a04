"""The router: which experts a token goes to and how much each counts.

T tokens, D hidden size, E experts, G groups of experts, K choices a token, B sequences (or 1)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipermoe.modules.linear import Linear
from pipermoe.modules.weight_gradients import WeightGradients
from pipermoe.specs import model as specs


class Router(Linear):
    """Scores every expert for every token in fp32 and keeps the best `top_k`.

    `correction_bias` (E,), fp32 and without gradient, takes part in the choice but not in the weights; the balance of
    load moves it (runtime/balance.py).
    """

    def __init__(self, model: specs.ModelSpec, gradients: WeightGradients, dtype: torch.dtype):
        moe, router = model.moe, model.moe.router
        super().__init__(model.hidden_size, moe.num_experts, gradients, bias=router.bias, dtype=dtype)
        self.spec, self.top_k = router, moe.top_k
        zeros_E = torch.zeros(moe.num_experts, dtype=torch.float32)
        if router.correction_bias == "parameter":
            self.correction_bias = nn.Parameter(zeros_E, requires_grad=False)
        else:
            self.register_buffer("correction_bias", zeros_E if router.correction_bias == "buffer" else None)

    def choose(
        self, x_TD: Tensor, planned_TK: Tensor | None = None, *, sequences: int = 1, z_loss: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Combine weights (T, K), mean shares of the score (B, E), z-loss (scalar) and chosen experts (T, K).

        `planned_TK` are choices given as data instead of the best scores. Shares are averaged over each of `sequences`
        equal stretches of tokens. The z-loss (0 unless `z_loss`) is the mean squared log-partition of the logits, which
        keeps them small (ST-MoE, arXiv 2202.08906, equation 5).
        """
        logits_TE = self(x_TD).float()
        scores_TE = logits_TE.softmax(-1) if self.spec.score == "softmax" else logits_TE.sigmoid()
        experts_TK = self._best(scores_TE.detach()) if planned_TK is None else planned_TK
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.spec.normalize_top_k:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        share_TE = scores_TE if self.spec.score == "softmax" else scores_TE / scores_TE.sum(-1, keepdim=True)
        share_BE = share_TE.view(sequences, -1, share_TE.shape[1]).mean(1)
        z = logits_TE.logsumexp(-1).square().mean() if z_loss else logits_TE.new_zeros(())
        return (weights_TK * self.spec.scaling_factor).to(x_TD.dtype), share_BE, z, experts_TK

    def _best(self, scores_TE: Tensor) -> Tensor:
        """The chosen experts (T, K): the best scores, corrected by the bias, in the groups that may be used."""
        if self.correction_bias is not None:
            scores_TE = scores_TE + self.correction_bias
        if self.spec.top_k_groups < self.spec.num_groups:
            scores_TE = scores_TE.masked_fill(self._closed(scores_TE), float("-inf"))
        return scores_TE.topk(self.top_k, dim=-1).indices

    def _closed(self, scores_TE: Tensor) -> Tensor:
        """Which experts lie outside of a token's best `top_k_groups` groups: (T, E) bool.

        A group is as good as its best expert (DeepSeek-V2, arXiv 2405.04434, section 2.2.2), with a correction bias as
        its two best together (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
        """
        groups = self.spec.num_groups
        scores_TGE = scores_TE.view(-1, groups, scores_TE.shape[1] // groups)
        counted = min(2, scores_TGE.shape[2]) if self.correction_bias is not None else 1
        groups_TG = scores_TGE.topk(counted, dim=-1).values.sum(-1)
        open_TK = groups_TG.topk(self.spec.top_k_groups, dim=-1).indices
        closed_TG = torch.ones_like(groups_TG, dtype=torch.bool).scatter_(1, open_TK, False)
        return closed_TG[..., None].expand(scores_TGE.shape).reshape(scores_TE.shape)


def count_choices(experts_TK: Tensor, num_experts: int) -> Tensor:
    """How many choices fall on each expert: (E,) int64. Unlike bincount its shape depends on no data."""
    choices = experts_TK.flatten()
    return torch.zeros(num_experts, dtype=torch.int64, device=choices.device).scatter_add_(
        0, choices, torch.ones_like(choices)
    )

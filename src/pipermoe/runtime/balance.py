"""How evenly experts are loaded: the load-balancing loss at its levels, and the bias that needs no loss.

T tokens, K choices a token, E experts, B sequences of a micro-batch (or 1), L MoE layers

Every forward of training is counted here once, outside of the pieces that recompute repeats.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from pipermoe.modules.router import Router, count_choices
from pipermoe.runtime.meter import Meter
from pipermoe.specs.train import AuxiliaryLossLevel


class Load:
    """How the choices of one micro-batch fall on the experts of one layer, perhaps still being summed over ranks."""

    def __init__(self, counts_BE: Tensor, work: dist.Work | None, meter: Meter):
        self._counts_BE, self._work, self._meter = counts_BE, work, meter

    def wait(self) -> Tensor:
        """The fraction of choices that falls on each expert (B, E), fp32; every row sums to 1."""
        if self._work is not None:
            with self._meter.term("all_to_all"):
                self._work.wait()
            self._work = None
        return self._counts_BE / self._counts_BE.sum(-1, keepdim=True)


class Balance:
    """Counts choices layer by layer, over one step.

    `level` says over which tokens the load of the auxiliary loss is taken: those of each "sequence" (DeepSeek-V3), of
    the "micro_batch" of one rank (Fedus et al. 2021), or of the "global_batch": all data-parallel ranks, and the
    micro-batches of the step up to this one (Qiu et al., arXiv 2501.11873, algorithm 1).
    """

    def __init__(self, level: AuxiliaryLossLevel, seq_len: int, group: dist.ProcessGroup, meter: Meter):
        self.level, self._seq_len, self._group, self._meter = level, seq_len, group, meter
        self._own: dict[Router, Tensor] = {}
        self._global: dict[Router, Tensor] = {}

    def sequences(self, tokens: int) -> int:
        """Over how many stretches of a micro-batch's tokens the loss is taken apart."""
        return tokens // self._seq_len if self.level == "sequence" else 1

    def begin_step(self) -> None:
        self._own.clear()
        self._global.clear()

    def chosen(self, router: Router) -> Tensor:
        """How often this rank's tokens of the last step chose each expert of a layer (E,)."""
        return self._own[router]

    def observe(self, router: Router, experts_TK: Tensor, num_experts: int, *, training: bool) -> Load:
        """Count one micro-batch's choices and launch what has to be summed."""
        sequences = self.sequences(experts_TK.shape[0])
        first_T1 = torch.arange(sequences, device=experts_TK.device).repeat_interleave(self._seq_len)[:, None]
        apart_TK = experts_TK if sequences == 1 else experts_TK + num_experts * first_T1
        counts_BE = count_choices(apart_TK, sequences * num_experts).view(sequences, num_experts)
        if training:
            _add(self._own, router, counts_BE.sum(0))
        if self.level != "global_batch":
            return Load(counts_BE, None, self._meter)
        return self._observe_globally(router, counts_BE, training)

    def _observe_globally(self, router: Router, counts_BE: Tensor, training: bool) -> Load:
        """Sum over ranks what this rank has seen so far: its earlier micro-batches are part of the sum."""
        seen_E = _add(self._global, router, counts_BE[0]) if training else counts_BE[0]
        total_BE = seen_E[None].clone()
        work = dist.all_reduce(total_BE, group=self._group, async_op=True) if self._group.size() > 1 else None
        return Load(total_BE, work, self._meter)

    @torch.no_grad()
    def move_correction_biases(self, routers: Iterable[Router], rate: float) -> None:
        """Raise the bias of every expert that had less than the mean load of the step by `rate`, lower the others'.

        The load is that of the whole batch: counts are summed over the ranks of the stage. Collective over them.
        Source: auxiliary-loss-free balancing (Wang et al., arXiv 2408.15664, algorithm 1).
        """
        biased = [router for router in routers if router.correction_bias is not None]
        if not biased:
            return
        counts_LE = torch.stack([self._own[router] for router in biased])
        if self._group.size() > 1:
            dist.all_reduce(counts_LE, group=self._group)
        for router, counts_E in zip(biased, counts_LE.double(), strict=True):
            assert router.correction_bias is not None
            router.correction_bias.add_((counts_E.mean() - counts_E).sign().float(), alpha=rate)


def balancing_loss(share_BE: Tensor, load_BE: Tensor) -> tuple[Tensor, Tensor]:
    """`E * sum_e f_e P_e`, 1 when balanced, and its gradient by the shares P (B, E); f is a constant.

    f_e is the fraction of choices that fall on expert e, P_e the mean share of the score that it gets; the mean over B.
    Source: Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6.
    """
    gradient_BE = load_BE * (load_BE.shape[1] / load_BE.shape[0])
    return (share_BE * gradient_BE).sum(), gradient_BE


def _add(totals: dict[Router, Tensor], router: Router, counts_E: Tensor) -> Tensor:
    totals[router] = counts_E + totals[router] if router in totals else counts_E
    return totals[router]

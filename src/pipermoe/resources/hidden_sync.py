"""What stays of reducing gradients and gathering weights in stacks that do both beside computing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.step import StepCosts
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.train import TrainConfig


def hide_sync(
    costs: StepCosts, train: TrainConfig, table: StrategyTable, stages_of: Sequence[Sequence[int]]
) -> StepCosts:
    """The costs where gradients are reduced beside the backward of the last micro-batch, and weights are gathered
    beside the forward of the first: what takes longer than those remains (ZeRO, arXiv 1910.02054; Megatron-LM's
    --overlap-grad-reduce and --overlap-param-gather). From ZeRO-2 on every backward reduces, at ZeRO-3 every pass
    gathers, a layer's weights while the one before computes (FSDP, arXiv 2304.11277); of dense and expert levels the
    lower counts. This project's runtime reduces beside the last backwards too, but where that was measured it takes
    the cores that compute: its own reductions are predicted as not hidden.
    """

    def per_rank(per_stage: NDArray) -> NDArray:
        return np.stack([per_stage[:, list(stages)].sum(axis=1) for stages in stages_of], axis=1)

    level = np.minimum(table.zero_dense, table.zero_expert)[:, None]
    passes = table.stage_microbatches(train.global_batch_size)[:, None]
    forward = np.where(level == 3, passes, 1) * per_rank(costs.forward)
    backward = np.where(level >= 2, passes, 1) * per_rank(costs.input_grad + costs.weight_grad)
    gathered_again = np.where(level == 3, costs.gather / 2, 0.0)
    return replace(
        costs,
        reduce=np.maximum(0.0, costs.reduce + gathered_again - backward),
        gather=np.maximum(0.0, costs.gather - gathered_again - forward),
    )

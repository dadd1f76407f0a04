"""Runs a DispatchPlan: every token crosses to a node once, forward and backward."""

from __future__ import annotations

import numpy as np
import torch

from pipermoe.exchange.dispatch import DispatchPlan
from pipermoe.exchange.executor.autograd import all_to_all
from pipermoe.exchange.executor.exchange import Exchange
from pipermoe.exchange.plan import Ints


def dispatch(x: torch.Tensor, plan: DispatchPlan, exchange: Exchange, builder: str = "auto") -> torch.Tensor:
    """Rows of `x` [T, D] for the experts of every rank, [N, D]: one copy per token and node crosses. Differentiable.

    The backward pass sums gradients inside the node before they cross, as `combine` does.
    """
    carried = all_to_all(x[_index(plan.cross_index, x)], plan.cross_splits, builder, exchange)
    held = torch.cat([carried, x])
    fanned = all_to_all(held[_index(plan.fan_index, x)], plan.fan_splits, "direct", exchange)
    return fanned[_index(plan.expand_index, x)]


def combine(y: torch.Tensor, plan: DispatchPlan, exchange: Exchange, builder: str = "auto") -> torch.Tensor:
    """The transpose of `dispatch`: the sum per token, [T, D], of the (weighted) expert rows `y` [N, D]. Differentiable.

    Rows are summed per rank, then per node; one sum per token and node crosses.
    """
    gathered = y.new_zeros(int(plan.fan_splits[:, plan.rank].sum()), *y.shape[1:])
    gathered = gathered.index_add(0, _index(plan.expand_index, y), y)
    fanned = all_to_all(gathered, plan.fan_splits.T, "direct", exchange)
    held = y.new_zeros(plan.rows_held, *y.shape[1:]).index_add(0, _index(plan.fan_index, y), fanned)
    carried, own = held.split([plan.rows_held - plan.num_tokens, plan.num_tokens])
    crossed = all_to_all(carried, plan.cross_splits.T, builder, exchange)
    return own.index_add(0, _index(plan.cross_index, y), crossed)


def dispatch_weights(weights: torch.Tensor, plan: DispatchPlan, exchange: Exchange) -> torch.Tensor:
    """Gate weights [T, K] to the rows they belong to, [N]: what `combine` sums must be weighted before it crosses."""
    flat = weights.reshape(-1)[_index(plan.choice_index, weights)]
    return all_to_all(flat, plan.choice_splits, "direct", exchange)


def _index(index: Ints, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(index)).to(like.device)

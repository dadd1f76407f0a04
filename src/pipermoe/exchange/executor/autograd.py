"""An all-to-all that gradients flow back through: the backward pass runs the reversed plan."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from pipermoe.exchange.executor.exchange import Exchange, row_bytes
from pipermoe.exchange.plan import ExchangePlan
from pipermoe.specs.errors import UserError


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, exchange: Exchange, plan: ExchangePlan, rows: int):
        ctx.exchange, ctx.plan, ctx.rows = exchange, plan, x.shape[0]
        output = x.new_empty(rows, *x.shape[1:])
        exchange.run(plan, output, x.contiguous())
        return output

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor):
        (gradient,) = gradients
        back = ctx.exchange.reverse(ctx.plan)
        result = gradient.new_empty(ctx.rows, *gradient.shape[1:])
        ctx.exchange.run(back, result, gradient.contiguous())
        return result, None, None, None


def all_to_all(x: torch.Tensor, splits: ArrayLike, plan: ExchangePlan | str, exchange: Exchange) -> torch.Tensor:
    """Differentiable: rows of `x` ordered by destination to rows ordered by source; backward runs the reverse plan.

    `splits[s, d]` rows go from s to d, the same matrix on all ranks; `plan` is its plan in bytes or a builder's name.
    """
    splits = np.asarray(splits, dtype=np.int64)
    if int(splits[exchange.rank].sum()) != x.shape[0]:
        raise UserError(
            f"splits[{exchange.rank}] sums to {splits[exchange.rank].sum()}, the input has {x.shape[0]} rows"
        )
    if isinstance(plan, str):
        plan = exchange.plan(splits * row_bytes(x), plan)
    if not np.array_equal(plan.counts, splits * row_bytes(x)):
        raise UserError(f"the plan {plan.name!r} was built for other splits or rows of another size")
    output = _AllToAll.apply(x, exchange, plan, int(splits[:, exchange.rank].sum()))
    assert isinstance(output, torch.Tensor)
    return output

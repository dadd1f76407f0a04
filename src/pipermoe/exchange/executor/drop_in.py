"""`torch.distributed.all_to_all_single`, by an exchange plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from pipermoe.exchange.agreement import Request
from pipermoe.exchange.executor.exchange import Exchange, Handle, default_group, row_bytes


def all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    *,
    exchange: Exchange | None = None,
) -> Handle | None:
    """`torch.distributed.all_to_all_single` with its signature and semantics, by an exchange plan.

    All ranks first learn of all splits (one small exchange), so wrong arguments raise the same UserError on all of them
    before any data moves; with `async_op`, when the handle is waited for. Who knows the splits of all ranks calls
    `Exchange.run` with a plan and saves that.
    """
    exchange = exchange or exchange_of(group)
    request = _request(exchange.size, output, input, output_split_sizes, input_split_sizes)
    if async_op:
        return exchange.later(input, lambda: exchange.run_agreed(request, output, input))
    exchange.now(lambda: exchange.run_agreed(request, output, input))
    return None


_EXCHANGES: dict[dist.ProcessGroup, Exchange] = {}


def exchange_of(group: dist.ProcessGroup | None = None) -> Exchange:
    """The Exchange of a process group, made at the first call, which is collective.

    It lives as long as the group: those of groups that have been destroyed are closed when the next one is made.
    """
    group = group if group is not None else default_group()
    if group not in _EXCHANGES:
        for gone in [other for other in _EXCHANGES if not _exists(other)]:
            _EXCHANGES.pop(gone).close()
        _EXCHANGES[group] = Exchange(group)
    return _EXCHANGES[group]


def _exists(group: dist.ProcessGroup) -> bool:
    try:
        dist.get_backend(group)
    except ValueError:
        return False
    return True


def _request(size: int, output, input, output_split_sizes, input_split_sizes) -> Request:
    """This rank's arguments, or what is wrong with them."""
    problem = ""
    rows: list[tuple[int, ...]] = []
    for name, tensor, splits in (("output", output, output_split_sizes), ("input", input, input_split_sizes)):
        length = tensor.shape[0] if tensor.dim() else 0
        if not tensor.dim():
            problem = problem or f"{name} must have at least one dimension"
        elif not tensor.is_contiguous():
            problem = problem or f"{name} must be contiguous; call .contiguous() first"
        if splits is None:
            if length % size:
                problem = problem or f"{name} has {length} rows, which {size} ranks do not divide; give its split sizes"
            splits = [length // size] * size
        elif len(splits) != size:
            problem = problem or f"{name}_split_sizes has {len(splits)} entries for {size} ranks"
        elif any(split < 0 for split in splits):
            problem = problem or f"{name}_split_sizes = {list(splits)}: must be 0 or more"
        elif sum(splits) != length:
            problem = problem or f"{name}_split_sizes sums to {sum(splits)}, but {name} has {length} rows"
        rows.append(tuple(splits) if len(splits) == size else (0,) * size)
    if input.dtype != output.dtype:
        problem = problem or f"input is {input.dtype}, output is {output.dtype}: must be the same"
    return Request(rows[1], rows[0], row_bytes(input), str(input.dtype), problem)

"""Parameters that share one reduction group, laid end to end in one buffer of weights and one of gradients.

The model's parameters and their gradients become views of these buffers, so the gradients of a step are reduced by a
single collective without a copy, ZeRO-1 shards are plain slices of equal length, and AdamW is one kernel over a slice.
"""

# N parameters of the group on this rank, padded to a multiple of its R ranks

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both and warns on every rank about the names of 2.11.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True)
class Span:
    """Where one parameter lies: elements start..stop of the flat buffers."""

    name: str
    start: int
    stop: int


class FlatParameters:
    """The parameters that `group` holds copies of. `sharded` (ZeRO-1): a rank updates one slice, gathers the rest.

    `owned` is this rank's slice of equal length whether sharded or not; `updated` is what its optimizer updates: the
    owned slice if sharded, everything otherwise. Parameters with weight decay come first, up to element `decayed`.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], group: dist.ProcessGroup, *, sharded: bool) -> None:
        # Sorting is stable, so the order is the model's otherwise.
        ordered = sorted(parameters, key=lambda item: not _is_decayed(*item))
        count = sum(parameter.numel() for _, parameter in ordered)
        ranks = dist.get_world_size(group)
        padded = -(-count // ranks) * ranks
        options = {"dtype": ordered[0][1].dtype, "device": ordered[0][1].device}
        self.group = group
        self.ranks = ranks
        self.decayed = sum(parameter.numel() for name, parameter in ordered if _is_decayed(name, parameter))
        self.weights_N = torch.zeros(padded, **options)
        self.spans = tuple(self._adopt_weights(ordered))
        self.gradients_N = torch.zeros(padded, **options)
        for span, (_, parameter) in zip(self.spans, ordered, strict=True):
            parameter.grad = self.gradients_N[span.start : span.stop].view(parameter.shape)
        shard = padded // ranks
        start = dist.get_rank(group) * shard
        self.owned = slice(start, start + shard)
        self.sharded = sharded and ranks > 1
        self.updated = self.owned if self.sharded else slice(0, padded)

    def _adopt_weights(self, ordered: list[tuple[str, Tensor]]) -> Iterator[Span]:
        """Move each parameter's storage into the flat buffer, freeing the old one before the next is moved."""
        stop = 0
        for name, parameter in ordered:
            start, stop = stop, stop + parameter.numel()
            view = self.weights_N[start:stop].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            yield Span(name, start, stop)

    def reduce_gradients(self) -> None:
        """Sum the gradients over the group: everywhere, or if sharded only into every rank's owned slice, in place."""
        if self.ranks == 1:
            return
        if self.sharded:
            _reduce_scatter(self.gradients_N[self.owned], self.gradients_N, group=self.group)
        else:
            dist.all_reduce(self.gradients_N, group=self.group)

    def gather_weights(self) -> None:
        """Give every rank the slices that the others updated."""
        if self.sharded:
            _all_gather(self.weights_N, self.weights_N[self.owned], group=self.group)

    def decay_slices(self) -> tuple[slice, slice]:
        """The updated slice, cut where weight decay ends: (with decay, without)."""
        start, stop = self.updated.start, self.updated.stop
        border = min(max(self.decayed, start), stop)
        return slice(start, border), slice(border, stop)

    def updated_spans(self) -> Iterator[tuple[Span, Span]]:
        """For every parameter that this rank updates, wholly or in part: (the parameter's span, the updated part)."""
        for span in self.spans:
            start, stop = max(span.start, self.updated.start), min(span.stop, self.updated.stop)
            if start < stop:
                yield span, Span(span.name, start, stop)


def _is_decayed(name: str, parameter: Tensor) -> bool:
    """Matrices are; norms, sinks and biases, those of experts too, are not."""
    return parameter.ndim >= 2 and not name.endswith(".bias")

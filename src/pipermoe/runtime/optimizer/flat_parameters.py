"""Parameters that are reduced and sharded together, laid end to end in one buffer of weights and one of gradients.

The model's parameters and their gradients are views of these buffers, so a reduction is a single collective in place, a
shard is a plain slice of equal length on every rank, and AdamW is one kernel over a slice. What a rank keeps between
uses depends on the ZeRO level (Rajbhandari et al. 2020): weights whole below 3, gradients whole below 2, else a shard.
"""

# N parameters on this rank, padded to a multiple of the R ranks of their group; S = N / R, one rank's shard

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipermoe.layout.expert_layout import EMPTY
from pipermoe.layout.transfer import Transfer
from pipermoe.modules.names import expert_name, unit_of
from pipermoe.runtime.optimizer.lent_weights import LentWeights

# torch 2.13 renamed both and warns on every rank about the names of 2.11.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Landed = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Span:
    """Where one parameter, or a part of it, lies: elements start..stop."""

    name: str
    start: int
    stop: int

    def within(self, held: slice) -> Span:
        """The part of this span inside of `held`, perhaps empty."""
        return Span(self.name, max(self.start, held.start), min(self.stop, held.stop))


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements `held` of a flat buffer are elements `span` of the vector of that name, which has `size` of them."""

    span: Span
    size: int
    held: slice


class FlatParameters:
    """The parameters that every rank of `group` holds a copy or a shard of, at ZeRO level `zero`.

    `weights` and `gradients` are what stays: whole (N) or this rank's shard (S). `owned` is this rank's shard whatever
    the level, `updated` what its optimizer updates: everything at level 0, the shard above; both in elements of N.
    Parameters with weight decay come first, up to element `decayed`. Gradients are fp32 whatever the weights are.

    While `lent` has them the parameters hold their weights, between `open_gradients` and `launch_reduction` their
    gradients; where those stay whole, always. Below level 2 they are reduced once a step, in place, and nothing may be
    added between `launch_reduction` and `reduce_gradients`.

    Of routed experts `experts` names the logical expert of each row of every parameter; `EMPTY` rows are nobody's.

    With `ends`, the first and the last rank of a pipeline, both hold these parameters: gradients are summed over the
    two as well, so that their weights stay equal, and the last rank's are the copy (`is_copy`), which counts nowhere.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        group: dist.ProcessGroup,
        zero: int,
        experts: Sequence[int] | None = None,
        ends: dist.ProcessGroup | None = None,
    ) -> None:
        # Sorting is stable, so the order is the model's otherwise.
        ordered = sorted(parameters, key=lambda item: not _is_decayed(*item))
        self.group, self.ranks = group, dist.get_world_size(group)
        self.ends, self.is_copy = ends, ends is not None and ends.rank() > 0
        self.zero = zero if self.ranks > 1 else 0
        self.spans, self.experts = tuple(_spans(ordered)), experts
        self.decayed = sum(parameter.numel() for name, parameter in ordered if _is_decayed(name, parameter))
        shard = -(-self.spans[-1].stop // self.ranks)
        self.size = shard * self.ranks
        start = dist.get_rank(group) * shard
        self.owned = slice(start, start + shard)
        self.updated = self.owned if self.zero else slice(0, self.size)
        self._parameters = [parameter for _, parameter in ordered]
        self.weights = self._adopt_weights()
        self.lent = LentWeights(self._parameters, self.weights)
        self._whole_gradients: Tensor | None = None
        self._reducing: tuple[dist.Work, Tensor, Landed] | None = None
        if self.zero >= 3:
            self.weights = self.weights[self.owned].clone()
            self.lent.drop()
        if self.zero < 2:
            self.open_gradients()
            assert self._whole_gradients is not None
            self.gradients = self._whole_gradients
        else:
            self.gradients = torch.zeros(shard, dtype=torch.float32, device=self.weights.device)

    def _adopt_weights(self) -> Tensor:
        """Move each parameter's storage into a flat buffer, freeing the old one before the next is moved."""
        like = self._parameters[0]
        whole_N = torch.zeros(self.size, dtype=like.dtype, device=like.device)
        for parameter, view in zip(self._parameters, self.views(whole_N), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad_dtype = torch.float32
        return whole_N

    def views(self, whole_N: Tensor) -> Iterator[Tensor]:
        """A view of each parameter's shape into a buffer of all N elements."""
        for span, parameter in zip(self.spans, self._parameters, strict=True):
            yield whole_N[span.start : span.stop].view(parameter.shape)

    @property
    def unit(self) -> str:
        """What is gathered together with these: "layers.7", "embedding" or "head"."""
        return unit_of(self.spans[0].name)

    @property
    def gathers(self) -> bool:
        """Whether weights are whole only while they are used."""
        return self.zero >= 3

    @property
    def scatters(self) -> bool:
        """Whether gradients are whole only while a backward fills them."""
        return self.zero >= 2

    @property
    def resident_weights(self) -> tuple[Tensor, ...]:
        """Weights that a rank holds between steps."""
        return (self.weights,)

    @property
    def resident_gradients(self) -> tuple[Tensor, ...]:
        return (self.gradients,)

    @property
    def whole_buffers(self) -> tuple[Tensor, ...]:
        """The buffers of all N elements that exist now, laid out as `spans` says."""
        return tuple(each for each in (self.lent.whole, self._whole_gradients) if each is not None)

    def stretches(self, held: slice) -> Iterator[Stretch]:
        """What lies in `held`, by the names of checkpoints: those of `spans`, and of each expert by its logical id."""
        for span in self._named():
            inside = span.within(held)
            if inside.start < inside.stop:
                within = Span(span.name, inside.start - span.start, inside.stop - span.start)
                yield Stretch(within, span.stop - span.start, slice(inside.start, inside.stop))

    def _named(self) -> Iterator[Span]:
        if self.experts is None:
            yield from self.spans
            return
        for span in self.spans:
            each = (span.stop - span.start) // len(self.experts)
            for row, expert in enumerate(self.experts):
                if expert != EMPTY:
                    start = span.start + row * each
                    yield Span(expert_name(span.name, expert), start, start + each)

    # What the optimizer reads and writes.

    def of_updated(self, whole_or_shard: Tensor) -> Tensor:
        """The stretch `updated` of a buffer that holds it: of all elements, or of the shard alone."""
        return whole_or_shard if whole_or_shard.numel() < self.size else whole_or_shard[self.updated]

    def of_owned(self, whole_or_shard: Tensor) -> Tensor:
        return whole_or_shard if whole_or_shard.numel() < self.size else whole_or_shard[self.owned]

    def reduce_gradients(self) -> None:
        """Finish the step's sum over the group, which may be on its way, and over the two ends of a pipeline."""
        if not self.scatters:
            if self._reducing is None:
                self.launch_reduction()
            self.settle_reduction()
        if self.ends is not None:
            dist.all_reduce(self.of_updated(self.gradients), group=self.ends)

    def gather_weights(self) -> dist.Work | None:
        """Start to give every rank the shards that the others updated, where ranks keep all of them."""
        if self.zero in (1, 2):
            return _all_gather(self.weights, self.weights[self.owned], group=self.group, async_op=True)
        return None

    def zero_gradients(self) -> None:
        self.gradients.zero_()

    def adopt(self, homes: Transfer, states: Sequence[Tensor]) -> None:
        """Where the homes of experts move, carry their parts of `states`; all else stays where it is."""

    def decay_slices(self) -> tuple[slice, slice]:
        """The updated slice, cut where weight decay ends: (with decay, without)."""
        start, stop = self.updated.start, self.updated.stop
        border = min(max(self.decayed, start), stop)
        return slice(start, border), slice(border, stop)

    # Level 3: whole weights while a layer is in use.

    def launch_gather(self) -> None:
        """Start to gather the weights, unless they are here or on their way."""
        if self.lent.whole is None:
            whole_N = torch.empty(self.size, dtype=self.weights.dtype, device=self.weights.device)
            work = _all_gather(whole_N, self.weights, group=self.group, async_op=True)
            assert work is not None
            self.lent.launch(whole_N, work.wait)

    def keep_shard(self) -> None:
        """Take over what was written into the gathered weights."""
        if self.zero >= 3:
            assert self.lent.whole is not None
            self.weights.copy_(self.lent.whole[self.owned])

    # Reduction: after the last backward of a step that fills a layer's gradients; at level 2 and 3 after every one.

    def open_gradients(self) -> None:
        """Let the parameters have gradients, zero at first, unless they have."""
        if self._whole_gradients is None:
            self._whole_gradients = torch.zeros(self.size, dtype=torch.float32, device=self.weights.device)
            for parameter, view in zip(self._parameters, self.views(self._whole_gradients), strict=True):
                parameter.grad = view

    def launch_reduction(self, landed: Landed = lambda: None) -> None:
        """Start to sum the gradients over the group: everywhere at level 0, into the owned shard above.

        `landed` is told when it has been waited for.
        """
        whole_N = self._whole_gradients
        if whole_N is None or self.ranks == 1:
            return  # the queue of another micro-batch has sent them along with its own
        if self.scatters:
            self._whole_gradients = None
            for parameter in self._parameters:
                parameter.grad = None
        if self.zero == 0:
            work = dist.all_reduce(whole_N, group=self.group, async_op=True)
        else:
            work = _reduce_scatter(whole_N[self.owned], whole_N, group=self.group, async_op=True)
        assert work is not None
        self._reducing = work, whole_N, landed

    def settle_reduction(self) -> Tensor | None:
        """Wait for the reduction in flight, if there is one; what was opened for it is added to the shard and given
        back."""
        if self._reducing is None:
            return None
        (work, whole_N, landed), self._reducing = self._reducing, None
        work.wait()
        landed()
        if not self.scatters:
            return None
        self.gradients += whole_N[self.owned]
        return whole_N


def _spans(ordered: list[tuple[str, nn.Parameter]]) -> Iterator[Span]:
    stop = 0
    for name, parameter in ordered:
        start, stop = stop, stop + parameter.numel()
        yield Span(name, start, stop)


def _is_decayed(name: str, parameter: Tensor) -> bool:
    """Matrices are; norms, sinks and biases, those of experts too, are not."""
    return parameter.ndim >= 2 and not name.endswith(".bias")

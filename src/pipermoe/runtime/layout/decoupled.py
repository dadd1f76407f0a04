"""Mechanism 2, decoupled: the optimizer state of every expert is spread evenly over all ranks and never moves.

SwiftMoE (arXiv 2504.19925): after a step every rank gets its part of every expert's gradient from all copies, updates
it, and sends it to every slot that holds the expert next. Weights travel in every step anyway, so another layout costs
nothing.
"""

# P ranks of the stage (edp x ep), S slots of a rank, H of them with an expert, E experts, C elements of a rank's part

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipermoe.layout.expert_layout import EMPTY, ExpertLayout
from pipermoe.modules.names import expert_name
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.layout.placement import Placement
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.optimizer.flat_parameters import FlatParameters, Span, Stretch
from pipermoe.runtime.pipeline.flight import Collective
from pipermoe.specs.mesh import Coordinates


class DecoupledExperts(FlatParameters):
    """One layer's experts in the slots of one rank, and this rank's part of all experts of the layer.

    `weights` and `gradients` are that part: for every parameter (E, C), end to end, those with weight decay first.
    `stage` says where each rank of the stage stands.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        layer: int,
        placement: Placement,
        groups: ProcessGroups,
        stage: Sequence[Coordinates],
        meter: Meter,
    ) -> None:
        super().__init__(parameters, groups.edp, 0)
        self._layer, self._placement, self._stage, self._meter = layer, placement, stage, meter
        self._part, self._transport = groups.stage.rank(), Collective(groups.stage)
        self._num_experts = placement.layout.num_experts
        self._elements = [parameter[0].numel() for parameter in self._parameters]
        self._columns = [-(-elements // len(stage)) for elements in self._elements]
        decays = [columns for columns, span in zip(self._columns, self.spans, strict=True) if span.stop <= self.decayed]
        self.decayed = self._num_experts * sum(decays)
        self._slot_weights, self._slot_gradients = self.weights, self.gradients
        self.weights = self._slot_weights.new_zeros(self._num_experts * sum(self._columns))
        self.gradients = torch.zeros_like(self.weights, dtype=torch.float32)
        self.owned = self.updated = slice(0, len(self.weights))
        self._collect(self._slot_weights, self.weights, placement.homes, edp=(0,))

    @property
    def resident_weights(self) -> tuple[Tensor, ...]:
        return self.weights, self._slot_weights

    @property
    def resident_gradients(self) -> tuple[Tensor, ...]:
        return self.gradients, self._slot_gradients

    def stretches(self, held: slice) -> Iterator[Stretch]:
        start = 0
        for span, elements, columns in zip(self.spans, self._elements, self._columns, strict=True):
            first = min(self._part * columns, elements)
            last = min(first + columns, elements)
            for expert in range(self._num_experts):
                name = expert_name(span.name, expert)
                if first < last:
                    yield Stretch(Span(name, first, last), elements, slice(start, start + last - first))
                start += columns

    def of_updated(self, whole_or_shard: Tensor) -> Tensor:
        return whole_or_shard

    def of_owned(self, whole_or_shard: Tensor) -> Tensor:
        return whole_or_shard

    def reduce_gradients(self) -> None:
        """Sum this rank's part of every expert's gradient over all copies, in the order of ranks."""
        self.gradients.zero_()
        everywhere = tuple({here.edp for here in self._stage})
        self._collect(self._slot_gradients, self.gradients, self._placement.layout, edp=everywhere)

    def zero_gradients(self) -> None:
        self._slot_gradients.zero_()

    def gather_weights(self) -> None:
        """Send this rank's part of every expert to all slots that hold it in the layout as it is now."""
        layout, slots = self._placement.layout, self._filled(self._placement.layout, self._part)
        parts = self._by_parameter(self.weights)
        experts_P = [self._experts(layout, rank) for rank in range(len(self._stage))]
        sent = torch.cat([part_EC[experts].flatten() for experts in experts_P for part_EC in parts])
        sizes = [experts.numel() * sum(self._columns) for experts in experts_P]
        received = self.weights.new_empty(slots.numel() * sum(self._columns) * len(self._stage))
        self._exchange(received, sent, [len(received) // len(self._stage)] * len(self._stage), sizes)
        del sent
        blocks = received.view(len(self._stage), -1).split([slots.numel() * columns for columns in self._columns], 1)
        for block, view, columns in zip(blocks, self.views(self._slot_weights), self._columns, strict=True):
            rows_HV = block.reshape(len(self._stage), slots.numel(), columns).transpose(0, 1).flatten(1)
            view[slots] = rows_HV[:, : view[0].numel()].reshape(slots.numel(), *view.shape[1:])
        self._meter.release(received)

    def _collect(self, slot_tensors: Tensor, total: Tensor, layout: ExpertLayout, edp: Sequence[int]) -> None:
        """Add to `total` this rank's part of what lies in all slots of `layout` on the ranks with these edp places."""
        nothing = torch.empty(0, dtype=torch.int64, device=total.device)
        slots = self._filled(layout, self._part) if self._stage[self._part].edp in edp else nothing
        blocks = []
        for view, columns in zip(self.views(slot_tensors), self._columns, strict=True):
            rows_HV = view[slots].flatten(1)
            padded_HV = nn.functional.pad(rows_HV, (0, columns * len(self._stage) - rows_HV.shape[1]))
            blocks.append(padded_HV.view(slots.numel(), len(self._stage), columns).transpose(0, 1).flatten(1))
        sent = torch.cat(blocks, 1)
        experts_P = [
            self._experts(layout, rank) if here.edp in edp else nothing for rank, here in enumerate(self._stage)
        ]
        sizes = [experts.numel() * sum(self._columns) for experts in experts_P]
        received = sent.new_empty(sum(sizes))
        self._exchange(received, sent.flatten(), sizes, [sent.shape[1]] * len(self._stage))
        del sent
        parts = self._by_parameter(total)
        for experts, block in zip(experts_P, received.split(sizes), strict=True):
            rows = block.split([experts.numel() * columns for columns in self._columns])
            for part_EC, rows_HC in zip(parts, rows, strict=True):
                part_EC[experts] += rows_HC.view(experts.numel(), part_EC.shape[1])
        self._meter.release(received)

    def _exchange(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        """All-to-all over the stage, waited for; the caller needs `sent` no longer."""
        self._transport.all_to_all(received, sent, received_sizes, sent_sizes).wait()
        self._meter.release(sent)

    def _by_parameter(self, part: Tensor) -> list[Tensor]:
        """The views (E, C) of a vector like `weights`, one for each parameter."""
        sizes = [self._num_experts * columns for columns in self._columns]
        return [each.view(self._num_experts, -1) for each in part.split(sizes)]

    def _filled(self, layout: ExpertLayout, rank: int) -> Tensor:
        """The slots with an expert on a rank of the stage (H,)."""
        slots_S = layout.slots_LNS[self._layer, self._stage[rank].ep]
        return self._index(np.flatnonzero(slots_S != EMPTY))

    def _experts(self, layout: ExpertLayout, rank: int) -> Tensor:
        """The experts in those slots (H,)."""
        slots_S = layout.slots_LNS[self._layer, self._stage[rank].ep]
        return self._index(slots_S[slots_S != EMPTY])

    def _index(self, places: NDArray[np.int64]) -> Tensor:
        """As a tensor, made by an operation, so that it counts as memory in real runs and dry ones."""
        return torch.from_numpy(places.astype(np.int64)).to(self.weights.device, copy=True)

"""Carrying experts: the moves of one layer between the ranks of a group as one all-to-all.

A parcel is all that travels of one expert, laid end to end; V elements. W elements that this rank sends or receives
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipermoe.layout.transfer import Move
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.pipeline.flight import Transport, Work


@dataclass(frozen=True, slots=True)
class SlotTensors:
    """Tensors of which row s belongs to the expert in slot s; `slots[s]` is that expert."""

    tensors: Sequence[Tensor]
    slots: Sequence[int]

    @property
    def parcel_elements(self) -> int:
        return sum(math.prod(tensor.shape[1:]) for tensor in self.tensors)

    def take(self, expert: int) -> Tensor:
        """A copy of the expert's rows as one parcel (V)."""
        slot = self.slots.index(expert)
        return torch.cat([tensor[slot].flatten() for tensor in self.tensors])

    def put(self, expert: int, parcel_V: Tensor) -> None:
        slot = self.slots.index(expert)
        parts = parcel_V.split([tensor[0].numel() for tensor in self.tensors])
        for tensor, part in zip(self.tensors, parts, strict=True):
            tensor[slot] = part.view(tensor.shape[1:])

    def add(self, expert: int, parcel_V: Tensor) -> None:
        self.put(expert, self.take(expert) + parcel_V)

    def clear(self, expert: int) -> None:
        slot = self.slots.index(expert)
        for tensor in self.tensors:
            tensor[slot] = 0


class Carrier:
    """Carries experts between the ranks of one group. Every rank of it knows all moves and calls the same."""

    def __init__(self, transport: Transport, rank: int, ranks: int, meter: Meter):
        self.rank, self._transport, self._ranks, self.meter = rank, transport, ranks, meter

    def launch(self, moves: Sequence[Move], held: SlotTensors) -> Parcels:
        """Send the parcel of every move that starts here."""
        out = sorted((move for move in moves if move.source == self.rank), key=lambda move: move.destination)
        coming = sorted((move for move in moves if move.destination == self.rank), key=lambda move: move.source)
        if not moves:
            return Parcels([], None, None, self.meter)
        size, like = held.parcel_elements, held.tensors[0]
        with self.meter.born("communication"):
            sent_W = torch.cat([like.new_empty(0), *(held.take(move.expert) for move in out)])
            received_W = like.new_empty(len(coming) * size)
        leaving = [size * sum(move.destination == rank for move in out) for rank in range(self._ranks)]
        arriving = [size * sum(move.source == rank for move in coming) for rank in range(self._ranks)]
        work = self._transport.all_to_all(received_W, sent_W, arriving, leaving)
        return Parcels(coming, work, (sent_W, received_W), self.meter)


class Parcels:
    """Parcels on their way to this rank, those of lower ranks first."""

    def __init__(self, moves: Sequence[Move], work: Work | None, buffers: tuple[Tensor, Tensor] | None, meter: Meter):
        self._moves, self._work, self._buffers, self._meter = moves, work, buffers, meter

    def wait(self) -> Iterator[tuple[Move, Tensor]]:
        """What has arrived (V), and by which move; to be called once, and to its end."""
        if self._work is None or self._buffers is None:
            return
        with self._meter.term("gradient_sync"):
            self._work.wait()
        sent_W, received_W = self._buffers
        self._buffers = None
        self._meter.release(sent_W)
        if self._moves:
            yield from zip(self._moves, received_W.chunk(len(self._moves)), strict=True)
        self._meter.release(received_W)


def spread(carrier: Carrier, moves: Sequence[Move], weights: SlotTensors) -> None:
    """Fill copies with the weights of their homes."""
    for move, parcel_V in carrier.launch(moves, weights).wait():
        weights.put(move.expert, parcel_V)


def sums(arrived: Iterable[tuple[Move, Tensor]], here: SlotTensors, rank: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, sum of what has come home and of what is here), added in the order of ranks wherever the home is."""
    parts: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
    for move, parcel_V in arrived:
        parts[move.expert].append((move.source, parcel_V))
    for expert, others in parts.items():
        own = [(rank, here.take(expert))] if expert in here.slots else []
        first, *rest = [parcel_V for _, parcel_V in sorted(own + others, key=lambda part: part[0])]
        yield expert, sum(rest, first)


def homeward(moves: Sequence[Move]) -> list[Move]:
    """The way back of `moves`."""
    return [Move(move.layer, move.expert, move.destination, move.source) for move in moves]

"""ExpertLayout: which rank holds which copy of which expert. One of the four decisions."""

# L MoE layers, N ranks of an expert-parallel group, S slots of a rank, E logical experts

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EMPTY = -1


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLayout:
    """Slot s of rank n computes expert `slots_LNS[l, n, s]` of layer l; an `EMPTY` slot computes nothing.

    Every expert has at least one copy in every layer. The numbers of experts, ranks and slots need not divide each
    other. `version` counts the layouts of a run, so that ranks can agree on which one they mean. `kept_LE` is the rank
    that has kept an expert's optimizer state so far, where that is known: see `home_LE`.
    """

    slots_LNS: NDArray[np.int64]
    num_experts: int
    version: int = 0
    kept_LE: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        slots = self.slots_LNS
        if slots.ndim != 3:
            raise ValueError(f"a layout has the shape (layers, ranks, slots), this one {slots.shape}")
        if slots.min(initial=0) < EMPTY or slots.max(initial=0) >= self.num_experts:
            raise ValueError(f"a slot holds an expert from 0 to {self.num_experts - 1}, or {EMPTY} if it is empty")
        layers, experts = np.nonzero(self.copies_LE == 0)
        if len(layers):
            raise ValueError(f"expert {experts[0]} of layer {layers[0]} has no slot")
        slots.flags.writeable = False

    @classmethod
    def static(cls, layers: int, ranks: int, experts: int, slots: int | None = None) -> ExpertLayout:
        """One copy of every expert, in order over the ranks, as even as can be; the slots left over are empty."""
        fewest = -(-experts // ranks)
        slots = fewest if slots is None else slots
        if slots < fewest:
            raise ValueError(f"{ranks} ranks of {slots} slots have no room for {experts} experts; slots = {fewest} do")
        table_NS = slots_of(np.array_split(np.arange(experts), ranks), slots)
        return cls(np.tile(table_NS, (layers, 1, 1)), experts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, ranks, slots of a rank)."""
        layers, ranks, slots = self.slots_LNS.shape
        return layers, ranks, slots

    @property
    def copies_LNE(self) -> NDArray[np.int64]:
        """How many copies of each expert each rank holds."""
        return count_copies(self.slots_LNS, self.num_experts)

    @property
    def copies_LE(self) -> NDArray[np.int64]:
        """How many copies of each expert there are."""
        return self.copies_LNE.sum(1)

    @property
    def home_LE(self) -> NDArray[np.int64]:
        """The rank that owns each expert's optimizer state where that is not sharded over all.

        It stays where it was kept so far if that rank has a copy, and else is with the copy on the lowest rank.
        """
        held_LEN = self.copies_LNE.transpose(0, 2, 1) > 0
        lowest_LE = held_LEN.argmax(2)
        if self.kept_LE is None:
            return lowest_LE
        stays_LE = np.take_along_axis(held_LEN, self.kept_LE[..., None], axis=2)[..., 0]
        return np.where(stays_LE, self.kept_LE, lowest_LE)

    def successor(self, slots_LNS: NDArray[np.int64]) -> ExpertLayout:
        """The next layout of the run. An expert that stays on its rank keeps its slot, so that nothing moves for it."""
        return ExpertLayout(_settled(self.slots_LNS, slots_LNS), self.num_experts, self.version + 1, self.home_LE)

    def same_as(self, other: ExpertLayout) -> bool:
        """Whether both give every rank the same copies; versions may differ."""
        return self.shape == other.shape and np.array_equal(self.copies_LNE, other.copies_LNE)


def slots_of(held: Sequence[NDArray[np.int64]], slots: int) -> NDArray[np.int64]:
    """The slots of one layer, (N, S), from the experts that each rank holds."""
    table_NS = np.full((len(held), slots), EMPTY, dtype=np.int64)
    for rank, experts in enumerate(held):
        table_NS[rank, : len(experts)] = experts
    return table_NS


def count_copies(slots_LNS: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """Copies of each expert on each rank, (L, N, E)."""
    layers, ranks, _ = slots_LNS.shape
    width = num_experts + 1  # the last column counts the empty slots
    held = np.where(slots_LNS == EMPTY, num_experts, slots_LNS).reshape(layers * ranks, -1)
    flat = held + width * np.arange(layers * ranks)[:, None]
    counts = np.bincount(flat.ravel(), minlength=layers * ranks * width)
    return counts.reshape(layers, ranks, width)[:, :, :num_experts]


def _settled(before_LNS: NDArray[np.int64], after_LNS: NDArray[np.int64]) -> NDArray[np.int64]:
    """`after` with the slots of every rank permuted so that what it held before lies where it lay."""
    if before_LNS.shape != after_LNS.shape:
        return after_LNS
    same = _distinct(before_LNS)[..., :, None] == _distinct(after_LNS)[..., None, :]  # (L, N, slot before, slot after)
    stays, stayed = same.any(3), same.any(2)
    # The slots that become free, in order, take what arrives, in order.
    free, arriving = np.argsort(stays, axis=2, kind="stable"), np.argsort(stayed, axis=2, kind="stable")
    settled = np.empty_like(after_LNS)
    np.put_along_axis(settled, free, np.take_along_axis(after_LNS, arriving, axis=2), axis=2)
    return np.where(stays, before_LNS, settled)


def _distinct(slots_LNS: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number for every slot that tells its expert and which copy on its rank it is: no rank has one twice."""
    width = slots_LNS.shape[2]
    earlier = np.tril(slots_LNS[..., :, None] == slots_LNS[..., None, :], -1).sum(3)
    return slots_LNS * width + earlier

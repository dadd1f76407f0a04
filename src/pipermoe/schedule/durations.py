"""How long the work of a schedule takes, and what an overlapped pair hides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipermoe.schedule.action import Action, Kind

Seconds = float | Sequence[float]


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds of work on one micro-batch. Every field is one number, or one number per stage.

    `forward`, `input_grad` and `weight_grad` are computation; a full backward is both gradients, unless `backward` says
    otherwise. `forward_exchange` and `backward_exchange` are the all-to-alls inside a forward and an input gradient: a
    micro-batch alone has to wait for them, an overlapped pair hides them behind the other's computation.
    `transfer` is the time between the end of an action and the arrival of its result on another rank, per stage that
    sends; it occupies its link. Gradients take as long, unless `transfer_backward` says otherwise.
    `unshard` and `reduce` run beside computation on the rank's collective lane.
    `overlap_efficiency` in [0, 1] is the share that a pair achieves of the hiding that is possible.
    """

    forward: Seconds = 1.0
    input_grad: Seconds = 1.0
    weight_grad: Seconds = 1.0
    backward: Seconds | None = None
    forward_exchange: Seconds = 0.0
    backward_exchange: Seconds = 0.0
    transfer: Seconds = 0.0
    transfer_backward: Seconds | None = None
    unshard: Seconds = 0.0
    reduce: Seconds = 0.0
    overlap_efficiency: float = 1.0

    def per_stage(self, num_stages: int) -> WorkTable:
        """The same, spelt out for every stage."""

        def spread(name: str) -> tuple[float, ...]:
            value = getattr(self, name)
            if isinstance(value, int | float):
                return (float(value),) * num_stages
            if len(value) != num_stages:
                raise ValueError(f"durations: {name} has {len(value)} values for {num_stages} stages")
            return tuple(map(float, value))

        input_grad, weight_grad = spread("input_grad"), spread("weight_grad")
        both = tuple(i + w for i, w in zip(input_grad, weight_grad, strict=True))
        nothing = (0.0,) * num_stages
        backward_exchange = spread("backward_exchange")
        return WorkTable(
            compute={
                Kind.FORWARD: spread("forward"),
                Kind.BACKWARD: both if self.backward is None else spread("backward"),
                Kind.INPUT_GRAD: input_grad,
                Kind.WEIGHT_GRAD: weight_grad,
            },
            exchange={
                Kind.FORWARD: spread("forward_exchange"),
                Kind.BACKWARD: backward_exchange,
                Kind.INPUT_GRAD: backward_exchange,
                Kind.WEIGHT_GRAD: nothing,
            },
            lane={Kind.UNSHARD: spread("unshard"), Kind.REDUCE: spread("reduce"), Kind.RESHARD: nothing},
            transfer=spread("transfer"),
            transfer_backward=spread("transfer" if self.transfer_backward is None else "transfer_backward"),
            overlap_efficiency=self.overlap_efficiency,
        )


@dataclass(frozen=True, slots=True)
class WorkTable:
    """Seconds per kind and stage, as the simulations read them: numbers, or arrays of one number per candidate."""

    compute: dict[Kind, Sequence[Any]]
    exchange: dict[Kind, Sequence[Any]]
    lane: dict[Kind, Sequence[Any]]
    transfer: Sequence[Any]
    transfer_backward: Sequence[Any]
    overlap_efficiency: float
    longest: Callable[[list[Any]], Any] = max

    @classmethod
    def stacked(cls, tables: Sequence[WorkTable]) -> WorkTable:
        """The tables of many candidates as one, every entry an array (candidates,)."""

        def stack(entries: Sequence[Sequence[float]]) -> NDArray:
            return np.ascontiguousarray(np.transpose(entries))

        def stack_kinds(entries: Sequence[dict[Kind, Sequence[float]]]) -> dict[Kind, Sequence[Any]]:
            return {kind: list(stack([entry[kind] for entry in entries])) for kind in entries[0]}

        (efficiency,) = {table.overlap_efficiency for table in tables}
        return cls(
            compute=stack_kinds([table.compute for table in tables]),
            exchange=stack_kinds([table.exchange for table in tables]),
            lane=stack_kinds([table.lane for table in tables]),
            transfer=list(stack([table.transfer for table in tables])),
            transfer_backward=list(stack([table.transfer_backward for table in tables])),
            overlap_efficiency=efficiency,
            longest=np.maximum.reduce,
        )

    def work(self, action: Action) -> tuple[Any, Any]:
        """Seconds of computation and of exposed all-to-all of a compute action.

        A pair at best takes the longest of: all its computation, all its all-to-alls, either part alone.
        """
        if not action.pair:
            return self.compute[action.kind][action.stage], self.exchange[action.kind][action.stage]
        forward, backward = map(self.work, action.pair)
        compute, exchange = forward[0] + backward[0], forward[1] + backward[1]
        hidden = compute + exchange - self.longest([compute, exchange, sum(forward), sum(backward)])
        return compute, exchange - self.overlap_efficiency * hidden

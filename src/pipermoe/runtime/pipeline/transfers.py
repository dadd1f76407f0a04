"""Point-to-point transfers between pipeline ranks: asynchronous sends, and when a send is known to have arrived."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.trace import POINT_TO_POINT
from pipermoe.schedule.action import Action, Kind, Schedule
from pipermoe.schedule.communication import matching_receive


class Transfers:
    """The sends and receives of one rank. A tag for every (stage, micro-batch, direction) lets them cross freely.

    `buffer` makes the tensor of one message. Receives may be posted before earlier sends of this rank: on NCCL, where
    operations between two ranks run in the order in which they were launched, each direction has a group of its own.
    """

    def __init__(self, schedule: Schedule, groups: ProcessGroups, meter: Meter, buffer: Callable[[], Tensor]):
        self._schedule, self._groups, self._meter, self._buffer = schedule, groups, meter, buffer
        self._sends: dict[Action, tuple[dist.Work, Tensor, Callable[[], None]]] = {}
        self._receives: dict[Action, tuple[dist.Work, Tensor, Callable[[], None]]] = {}

    def send(self, action: Action, tensor: Tensor) -> None:
        """Launch the send; the tensor is kept until `settle`."""
        receive = matching_receive(action)
        peer = self._groups.pp[self._schedule.rank_of(receive.stage, receive.microbatch)]
        work = dist.isend(tensor, peer, group=self._groups.messages(self._groups.rank, peer), tag=self._tag(receive))
        assert work is not None
        self._sends[action] = (work, tensor, self._meter.launched(POINT_TO_POINT))

    def post(self, action: Action) -> None:
        """Launch the receive of what the matching send carries, so that it may come before it is needed."""
        source = action.stage - 1 if action.kind is Kind.RECV_FORWARD else action.stage + 1
        peer = self._groups.pp[self._schedule.rank_of(source, action.microbatch)]
        with self._meter.born("communication"):
            tensor = self._buffer()
        group = self._groups.messages(peer, self._groups.rank)
        work = dist.irecv(tensor, peer, group=group, tag=self._tag(action))
        assert work is not None
        self._receives[action] = (work, tensor, self._meter.launched(POINT_TO_POINT))

    def receive(self, action: Action) -> Tensor:
        """The tensor of a receive, which is posted now if it is not yet."""
        if action not in self._receives:
            self.post(action)
        work, tensor, landed = self._receives.pop(action)
        with self._meter.term("pipeline_wait"):
            work.wait()
        landed()
        return tensor

    def settle(self, sends: tuple[Action, ...]) -> None:
        """Wait for these sends and let their tensors go."""
        with self._meter.term("pipeline_wait"):
            for action in sends:
                work, _, landed = self._sends.pop(action)
                work.wait()
                landed()

    def settle_all(self) -> None:
        self.settle(tuple(self._sends))

    def _tag(self, receive: Action) -> int:
        return 2 * (receive.stage * self._schedule.microbatches + receive.microbatch) + (
            receive.kind is Kind.RECV_BACKWARD
        )

"""Point-to-point transfers between pipeline ranks: asynchronous sends, and when a send is known to have arrived."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.trace import POINT_TO_POINT
from pipermoe.schedule.action import RECEIVES, SENDS, Action, Kind, Schedule
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


def acknowledgements(schedule: Schedule, rank: int) -> dict[Action, tuple[Action, ...]]:
    """Which sends of `rank` are known to have arrived after which of its receives.

    A receive proves what its sender had received before sending, directly or through others: vector clocks (Fidge 1988,
    Mattern 1989) over the schedule tell where. Waiting for a send there never blocks, so buffers are freed as early as
    a rank can know, by a rule that depends on the schedule and not on timing.
    """
    programs = [list(schedule.parts(each)) for each in range(schedule.num_ranks)]
    index = {(each, action): i for each, program in enumerate(programs) for i, action in enumerate(program)}
    clocks = [[0] * schedule.num_ranks for _ in programs]  # clocks[a][b]: actions of b that a knows to be done
    position = [0] * schedule.num_ranks
    carried: dict[Action, list[int]] = {}  # by the receive that takes it
    pending: dict[Action, tuple[int, int]] = {}  # sends of `rank`: (peer, index of the receive)
    settled: dict[Action, list[Action]] = defaultdict(list)
    progress = True
    while progress:
        progress = False
        for each, program in enumerate(programs):
            while position[each] < len(program):
                action = program[position[each]]
                if action.kind in RECEIVES:
                    if action not in carried:
                        break
                    clocks[each] = [max(pair) for pair in zip(clocks[each], carried.pop(action), strict=True)]
                position[each] += 1
                clocks[each][each] = position[each]
                progress = True
                if action.kind in SENDS:
                    receive = matching_receive(action)
                    carried[receive] = list(clocks[each])
                    peer = schedule.rank_of(receive.stage, receive.microbatch)
                    if each == rank:
                        pending[action] = (peer, index[peer, receive])
                if each == rank and action.kind in RECEIVES:
                    arrived = [send for send, (peer, i) in pending.items() if clocks[rank][peer] > i]
                    for send in arrived:
                        del pending[send]
                        settled[action].append(send)
    return {receive: tuple(sends) for receive, sends in settled.items()}

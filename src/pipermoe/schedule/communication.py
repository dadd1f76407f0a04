"""From a schedule of compute actions to one with its sends and receives, in an order that cannot deadlock."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import NamedTuple

from pipermoe.schedule.action import RECEIVES, SENDS, Action, Kind, Schedule, source_of
from pipermoe.schedule.timeline import simulate

_SEND = {
    Kind.FORWARD: Kind.SEND_FORWARD,
    Kind.BACKWARD: Kind.SEND_BACKWARD,
    Kind.INPUT_GRAD: Kind.SEND_BACKWARD,
}
_RECEIVE = {
    Kind.FORWARD: Kind.RECV_FORWARD,
    Kind.BACKWARD: Kind.RECV_BACKWARD,
    Kind.INPUT_GRAD: Kind.RECV_BACKWARD,
}


def receive_of(schedule: Schedule, part: Action, rank: int) -> tuple[Action, int] | None:
    """The receive that a compute action on `rank` needs, and the sending rank; None when its data is local."""
    source = source_of(schedule, part)
    if source is None or source[1] == rank:
        return None
    return Action(_RECEIVE[part.kind], part.stage, part.microbatch), source[1]


def send_of(schedule: Schedule, part: Action, rank: int) -> tuple[Action, int] | None:
    """The send that follows a compute action on `rank`, and the receiving rank; None when its result stays here."""
    if part.kind not in _SEND:
        return None
    target = part.stage + (1 if part.kind is Kind.FORWARD else -1)
    if not 0 <= target < schedule.num_stages:
        return None
    peer = schedule.rank_of(target, part.microbatch)
    return None if peer == rank else (Action(_SEND[part.kind], part.stage, part.microbatch), peer)


def matching_receive(send: Action) -> Action:
    """The receive on the other side of a send."""
    if send.kind is Kind.SEND_FORWARD:
        return Action(Kind.RECV_FORWARD, send.stage + 1, send.microbatch)
    return Action(Kind.RECV_BACKWARD, send.stage - 1, send.microbatch)


def with_communication(schedule: Schedule) -> Schedule:
    """The schedule with a send after every action whose result another rank needs and a receive before its use.

    Between any two ranks, receives come in the order of the sends. The order cannot deadlock: neither with asynchronous
    sends and blocking receives nor when a send blocks until its receive is posted, because it is the record of a run
    with such rendezvous sends. A receive stands right before the action that uses it, except where ranks would wait
    for each other's receives in a circle: there one of them receives before it sends, the one whose message is there
    first if all stages are alike. A runtime may therefore post a receive where it stands and wait for it at its use, or
    simply block.
    """
    lowered = _Rendezvous(without_communication(schedule)).run()
    return replace(schedule, ranks=tuple(map(tuple, lowered)))


def without_communication(schedule: Schedule) -> Schedule:
    """The schedule without sends and receives."""
    ranks = (tuple(a for a in actions if a.kind not in SENDS | RECEIVES) for actions in schedule.ranks)
    return replace(schedule, ranks=tuple(ranks))


class _Rendezvous:
    """One run of a compute-only schedule in which every send waits for its receive; it records who did what when."""

    def __init__(self, schedule: Schedule) -> None:
        timeline = simulate(schedule)
        self.schedule = schedule
        self.done: list[list[Action]] = [[] for _ in schedule.ranks]
        self.todo = [
            deque(zip(actions, starts, ends, strict=True))
            for actions, starts, ends in zip(schedule.ranks, timeline.start, timeline.end, strict=True)
        ]
        self.sending: list[deque[Message]] = [deque() for _ in schedule.ranks]  # what a rank is held up by
        self.arrived: list[set[Action]] = [set() for _ in schedule.ranks]  # received, used or not

    def run(self) -> list[list[Action]]:
        ranks = range(len(self.done))
        while any(self.todo) or any(self.sending):
            advanced = [rank for rank in ranks if self._advance(rank)]
            if not advanced and not any(self._break_circle(rank) for rank in ranks):
                raise AssertionError(f"schedule {self.schedule.name} ran in simulation, but not with rendezvous sends")
        return self.done

    def _advance(self, rank: int) -> bool:
        """Run actions of `rank` until it waits for a peer; whether it did any."""
        before = len(self.done[rank])
        while not self.sending[rank] and self.todo[rank]:
            action, _, end = self.todo[rank][0]
            if not all(self._receive_until(rank, part) for part in action.parts):
                break
            self.todo[rank].popleft()
            self.done[rank].append(action)
            for part in action.parts:
                if send := send_of(self.schedule, part, rank):
                    self.sending[rank].append(Message(*send, end))
        return len(self.done[rank]) > before

    def _receive_until(self, rank: int, part: Action) -> bool:
        """Receive from the peer, in its order, up to what `part` needs; False when the peer is not there yet."""
        need = receive_of(self.schedule, part, rank)
        if need is None:
            return True
        receive, peer = need
        while receive not in self.arrived[rank]:
            if not (self.sending[peer] and self.sending[peer][0].receiver == rank):
                return False
            self._meet(peer, rank)
        return True

    def _waits_for(self, rank: int) -> int | None:
        """The peer that holds `rank` up: the one it sends to, or else the one whose message its next action needs."""
        if self.sending[rank]:
            return self.sending[rank][0].receiver
        for part in self.todo[rank][0][0].parts if self.todo[rank] else ():
            need = receive_of(self.schedule, part, rank)
            if need and need[0] not in self.arrived[rank]:
                return need[1]
        return None

    def _break_circle(self, start: int) -> bool:
        """If the ranks that `start` waits for form a circle, one of them receives before it goes on."""
        path: list[int] = []
        rank: int | None = start
        while rank is not None and rank not in path:
            path.append(rank)
            rank = self._waits_for(rank)
        if rank is None:
            return False
        circle = path[path.index(rank) :]
        pairs = [pair for pair in zip(circle, circle[1:] + circle[:1], strict=True) if self.sending[pair[0]]]
        if not pairs:
            return False
        self._meet(*min(pairs, key=lambda pair: self.sending[pair[0]][0].ready - self._goes_on(pair[1])))
        return True

    def _goes_on(self, rank: int) -> float:
        """When `rank` would send or compute next if nothing held it up."""
        return self.sending[rank][0].ready if self.sending[rank] else self.todo[rank][0][1]

    def _meet(self, sender: int, receiver: int) -> None:
        send = self.sending[sender].popleft().send
        receive = matching_receive(send)
        self.done[sender].append(send)
        self.done[receiver].append(receive)
        self.arrived[receiver].add(receive)


class Message(NamedTuple):
    """A send that is held up: the receiving rank, and when its data was ready in a run without such delays."""

    send: Action
    receiver: int
    ready: float

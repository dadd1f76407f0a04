"""From a schedule of compute actions to one with its sends and receives, in an order that cannot deadlock."""

from __future__ import annotations

from dataclasses import replace

from pipermoe.schedule.action import RECEIVES, SENDS, Action, Kind, Schedule, source_of
from pipermoe.schedule.rendezvous import rendezvous

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
    return replace(schedule, ranks=tuple(map(tuple, rendezvous(without_communication(schedule)))))


def without_communication(schedule: Schedule) -> Schedule:
    """The schedule without sends and receives."""
    ranks = (tuple(a for a in actions if a.kind not in SENDS | RECEIVES) for actions in schedule.ranks)
    return replace(schedule, ranks=tuple(ranks))

"""One run of a schedule in which every send waits for its receive: it records who sends and receives what when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pipermoe.schedule.action import Action, Kind, Schedule
from pipermoe.schedule.columns import Columns, inboxes
from pipermoe.schedule.timeline import simulate

_NEED, _ACT, _SEND = range(3)  # of an action, in this order
_MOVES = (Kind.RECV_FORWARD, Kind.SEND_FORWARD, Kind.RECV_BACKWARD, Kind.SEND_BACKWARD)


class _Script(NamedTuple):
    """What a rank does, step by step: have an input from `peer`, act, send a result to `peer`."""

    step: list[int]  # _NEED, _ACT or _SEND
    what: list[int]  # the inbox, or the position of the action
    peer: list[int]
    when: list[float]  # when it would be done in a run without any waiting for peers


def rendezvous(schedule: Schedule) -> list[Iterator[Action]]:
    """The actions of every rank of a compute-only schedule, with the sends and receives between them."""
    return _Rendezvous(schedule).run()


class _Rendezvous:
    """Ranks run until they wait for a peer; what they do until then does not depend on the order of visits.

    In a circle of ranks that wait for each other, one receives before it goes on.
    """

    def __init__(self, schedule: Schedule) -> None:
        ranks = range(schedule.num_ranks)
        self.schedule = schedule
        self.scripts = _scripts(schedule)
        self.at = [0 for _ in ranks]
        self.waits_for: list[int | None] = [None for _ in ranks]
        self.sending = [False for _ in ranks]  # it waits for its receiver, not for data
        self.arrived = bytearray(inboxes(schedule))
        # What was done: positions of actions, ~(2 * inbox) for a receive, ~(2 * inbox + 1) for a send.
        self.done: list[list[int]] = [[] for _ in ranks]

    def run(self) -> list[Iterator[Action]]:
        ranks = range(len(self.done))
        woken = list(ranks)
        while woken:
            while woken:
                self._advance(woken.pop(), woken)
            if any(peer is not None for peer in self.waits_for):
                woken = next(filter(None, map(self._break_circle, ranks)), [])
                if not woken:
                    raise AssertionError(f"{self.schedule.name} ran in simulation, but not with rendezvous sends")
        return [self._actions(rank) for rank in ranks]

    def _advance(self, rank: int, woken: list[int]) -> None:
        """Run `rank` until it waits for a peer; peers that may go on thereby are added to `woken`."""
        if self.sending[rank]:
            return
        step, what, peers, _ = self.scripts[rank]
        done, arrived, waits_for = self.done[rank], self.arrived, self.waits_for
        at = self.at[rank]
        waits_for[rank] = None
        while at < len(step):
            if step[at] == _ACT:
                done.append(what[at])
            else:
                peer = peers[at]
                if step[at] == _SEND:
                    waits_for[rank], self.sending[rank] = peer, True
                    if waits_for[peer] == rank:
                        woken.append(peer)
                    break
                inbox = what[at]
                if not arrived[inbox] and self.sending[peer] and waits_for[peer] == rank:
                    self._meet(peer, rank)
                    woken.append(peer)
                if not arrived[inbox]:
                    waits_for[rank] = peer
                    break
            at += 1
        self.at[rank] = at

    def _break_circle(self, start: int) -> list[int]:
        """If the ranks that `start` waits for form a circle, one of them receives; the two ranks that met."""
        path: list[int] = []
        rank: int | None = start
        while rank is not None and rank not in path:
            path.append(rank)
            rank = self.waits_for[rank]
        if rank is None:
            return []
        circle = path[path.index(rank) :]
        pairs = [pair for pair in zip(circle, circle[1:] + circle[:1], strict=True) if self.sending[pair[0]]]
        if not pairs:
            return []
        sender, receiver = min(pairs, key=lambda pair: self._goes_on(pair[0]) - self._goes_on(pair[1]))
        self._meet(sender, receiver)
        return [sender, receiver]

    def _goes_on(self, rank: int) -> float:
        """When `rank` would send or act next if nothing held it up."""
        return self.scripts[rank].when[self.at[rank]]

    def _meet(self, sender: int, receiver: int) -> None:
        inbox = self.scripts[sender].what[self.at[sender]]
        self.done[sender].append(~(2 * inbox + 1))
        self.done[receiver].append(~(2 * inbox))
        self.arrived[inbox] = True
        self.at[sender] += 1
        self.sending[sender] = False

    def _actions(self, rank: int) -> Iterator[Action]:
        """What `rank` did, as actions."""
        own, done = self.schedule.ranks[rank], np.array(self.done[rank], dtype=np.int64)
        inbox, sent = np.divmod(~done[done < 0], 2)
        place, microbatch = np.divmod(inbox, self.schedule.microbatches)
        backward, stage = np.divmod(place, self.schedule.num_stages)
        stage += sent * (2 * backward - 1)  # a send is of the stage before the inbox, in its direction
        kinds = map(_MOVES.__getitem__, (2 * backward + sent).tolist())
        moves = map(Action, kinds, stage.tolist(), microbatch.tolist())
        return (own[each] if each >= 0 else next(moves) for each in self.done[rank])


def _scripts(schedule: Schedule) -> list[_Script]:
    """What every rank does, in order: of an action first the inputs from other ranks, last the results for them."""
    columns, timeline = Columns.of(schedule), simulate(schedule)
    start, end = (np.concatenate([np.zeros(0), *times]) for times in (timeline.start, timeline.end))
    first = np.cumsum([0, *map(len, schedule.ranks)])
    action = first[columns.rank] + columns.position
    taken = np.flatnonzero((columns.source >= 0) & (columns.source != columns.rank))
    given = np.flatnonzero((columns.target >= 0) & (columns.target != columns.rank))
    acted = np.flatnonzero(np.diff(action, prepend=-1))
    step = np.repeat([_NEED, _ACT, _SEND], [len(taken), len(acted), len(given)])
    of = np.concatenate([action[taken], action[acted], action[given]])
    what = np.concatenate([columns.inbox[taken], columns.position[acted], columns.outbox[given]])
    peer = np.concatenate([columns.source[taken], columns.rank[acted], columns.target[given]])
    order = np.argsort(3 * of + step, kind="stable")  # the forward of a pair before its backward
    step, of, what, peer = step[order], of[order], what[order], peer[order]
    when = np.where(step == _SEND, end[of], start[of])
    ends = np.searchsorted(of, first[1:])
    return [
        _Script(*(column[begin:end].tolist() for column in (step, what, peer, when)))
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    ]

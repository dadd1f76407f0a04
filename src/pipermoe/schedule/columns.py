"""A schedule as columns of whole numbers: what walks over thousands of actions read instead of objects."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipermoe.schedule.action import Kind, Schedule

# P elementary actions of all ranks, one rank after the other, each in its order

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

KINDS = tuple(Kind)
CODE = {kind: code for code, kind in enumerate(KINDS)}


_KIND, _STAGE, _MICROBATCH, _PAIR = map(itemgetter, range(4))


class _Data(NamedTuple):
    """What a kind of action does with data: the direction it belongs to, and whether it takes and hands on any."""

    backward: bool = False
    takes: bool = False
    hands_on: bool = False


_DATA = {
    Kind.FORWARD: _Data(takes=True, hands_on=True),
    Kind.BACKWARD: _Data(backward=True, takes=True, hands_on=True),
    Kind.INPUT_GRAD: _Data(backward=True, takes=True, hands_on=True),
    Kind.SEND_FORWARD: _Data(hands_on=True),
    Kind.SEND_BACKWARD: _Data(backward=True, hands_on=True),
    Kind.RECV_FORWARD: _Data(takes=True),
    Kind.RECV_BACKWARD: _Data(backward=True, takes=True),
}
_BACKWARD, _TAKES, _HANDS_ON = np.array([_DATA.get(kind, _Data()) for kind in KINDS]).T


@dataclass(frozen=True, slots=True)
class Columns:
    """The elementary actions of a schedule; overlapped pairs are taken apart. All arrays are (P,).

    `position` is that of the whole action in the order of its rank. An inbox is the place of one input: of a stage,
    micro-batch and direction. `inbox` is what the action uses or receives, `outbox` what it fills or sends to; `source`
    and `target` are the pipeline ranks at the other end. -1: none.
    """

    rank: Ints
    position: Ints
    kind: Ints  # a place in KINDS
    stage: Ints
    microbatch: Ints
    inbox: Ints
    outbox: Ints
    source: Ints
    target: Ints

    @classmethod
    def of(cls, schedule: Schedule) -> Columns:
        sizes = [len(actions) for actions in schedule.ranks]
        rank = np.repeat(np.arange(schedule.num_ranks), sizes)
        position = np.arange(len(rank)) - np.repeat(np.cumsum([0, *sizes])[:-1], sizes)
        actions = list(chain.from_iterable(schedule.ranks))
        if any(map(_PAIR, actions)):
            parts = np.array([len(action.parts) for action in actions])
            rank, position = np.repeat(rank, parts), np.repeat(position, parts)
            actions = list(chain.from_iterable(action.parts for action in actions))
        kind = np.fromiter(map(CODE.__getitem__, map(_KIND, actions)), np.int64, len(actions))
        stage = np.fromiter(map(_STAGE, actions), np.int64, len(actions))
        microbatch = np.fromiter(map(_MICROBATCH, actions), np.int64, len(actions))
        inbox, source = _end(schedule, kind, stage, microbatch, outgoing=False)
        outbox, target = _end(schedule, kind, stage, microbatch, outgoing=True)
        return cls(rank, position, kind, stage, microbatch, inbox, outbox, source, target)

    def of_kind(self, *kinds: Kind) -> Flags:
        """Which actions are of one of `kinds`."""
        return np.isin(self.kind, [CODE[kind] for kind in kinds])


def _end(schedule: Schedule, kind: Ints, stage: Ints, microbatch: Ints, *, outgoing: bool) -> tuple[Ints, Ints]:
    """The inbox of the data that actions take, or hand on, and the rank at the other end."""
    backward = _BACKWARD[kind]
    up = backward != outgoing  # the next stage's data, or its inbox
    other = np.where(up, stage + 1, stage - 1)
    there = (_HANDS_ON if outgoing else _TAKES)[kind] & (other >= 0) & (other < schedule.num_stages)
    other = np.where(there, other, 0)
    rank = np.array(schedule.stage_rank, dtype=np.int64)[other]
    if schedule.mirror_rank:
        rank = np.where(microbatch % 2 == 1, np.array(schedule.mirror_rank)[other], rank)
    owner = other if outgoing else stage
    inbox = (backward * schedule.num_stages + owner) * schedule.microbatches + microbatch
    return np.where(there, inbox, -1), np.where(there, rank, -1)


def inboxes(schedule: Schedule) -> int:
    """How many inboxes there are."""
    return 2 * schedule.num_stages * schedule.microbatches

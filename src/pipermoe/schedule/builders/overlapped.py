"""Overlapped variants: a micro-batch's forward beside another's backward, so that all-to-alls hide behind compute."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipermoe.schedule.action import Action, Kind, Schedule, overlap
from pipermoe.schedule.builders.dualpipe import dualpipe_v
from pipermoe.schedule.builders.squeeze import LONG_EXCHANGES, Limits, squeeze
from pipermoe.schedule.builders.zero_bubble import zb_h2
from pipermoe.schedule.memory import in_flight


def overlapped(schedule: Schedule) -> Schedule:
    """The schedule with its stages and its orders of forwards and of backwards, but run in slots.

    In every slot each rank runs its next forward and its next backward if their data is there, as a pair if both are.
    A micro-batch that another rank works on in one slot can be continued here in the next, so a rank warms up with one
    forward per slot of the round trip; that costs activations (1f1b: 2 (p - r) on rank r instead of p - r) and no
    bubble beyond the warm-up. A schedule that splits backwards still does so once a rank has no forward left; its
    weight gradients then fill what is idle if F, I and W take equally long.
    """
    split = schedule.splits_backward
    ranks = [_Rank(schedule, rank, split) for rank in range(schedule.num_ranks)]
    slot = 0
    while any(not rank.finished for rank in ranks):
        made = [outcome for rank in ranks for outcome in rank.run_slot(slot)]
        for stage, microbatch, backward in made:
            if stage >= 0:
                ranks[schedule.rank_of(stage, microbatch)].ready_at[stage, microbatch, backward] = slot + 1
        slot += 1
    paired = replace(schedule, name=f"{schedule.name}-overlap", ranks=tuple(tuple(rank.done) for rank in ranks))
    if not split:
        return paired
    return squeeze(paired, Limits.equal(paired, math.inf))


def overlapped_and_split(paired: Schedule, name: str) -> Schedule:
    """A schedule of pairs with the backwards in them split as well, within the memory that it has.

    A pair of F and I ends after two thirds of the time of one of F and B, so micro-batches come round sooner; weight
    gradients wait for idle time. Laid out for all-to-alls of half the computation.
    """

    def split(part: Action) -> Action:
        return part._replace(kind=Kind.INPUT_GRAD) if part.kind is Kind.BACKWARD else part

    def order(actions: Sequence[Action]) -> Iterator[Action]:
        for action in actions:
            if action.kind is not Kind.WEIGHT_GRAD:
                yield overlap(*map(split, action.pair)) if action.pair else split(action)

    spines = replace(paired, name=name, ranks=tuple(tuple(order(actions)) for actions in paired.ranks))
    return squeeze(spines, Limits.equal(paired, max(in_flight(paired).rank)), LONG_EXCHANGES, patience=0.5)


def zb_h2_overlap(pipeline_parallel: int, microbatches: int, virtual_stages: int = 1) -> Schedule:
    """ZB-H2 in pairs: 2 p activations, one more than ZB-H2, since the last stage too needs two for a pair."""
    return overlapped_and_split(overlapped(zb_h2(pipeline_parallel, microbatches)), "zb-h2-overlap")


def zb_v_overlap(pipeline_parallel: int, microbatches: int, virtual_stages: int = 2) -> Schedule:
    """ZB-V in pairs: DualPipe-V's order and memory (half an activation more than ZB-V), with every backward split."""
    return overlapped_and_split(dualpipe_v(pipeline_parallel, microbatches), "zb-v-overlap")


class _Rank:
    """What one rank has done and has left, and from which slot on the data of its work is there."""

    def __init__(self, schedule: Schedule, rank: int, split: bool) -> None:
        parts = list(schedule.parts(rank))
        self.forwards = deque(part for part in parts if part.kind is Kind.FORWARD)
        self.backwards = deque(part for part in parts if part.kind in (Kind.BACKWARD, Kind.INPUT_GRAD))
        self.split = split
        self.last_stage = schedule.num_stages - 1
        self.ready_at = {(0, m, False): 0 for m in range(schedule.microbatches)}
        self.done: list[Action] = []

    @property
    def finished(self) -> bool:
        return not (self.forwards or self.backwards)

    def run_slot(self, slot: int) -> list[tuple[int, int, bool]]:
        """Do what this slot allows; the inputs (stage, micro-batch, backward) that it makes ready elsewhere."""
        forward = self._take(self.forwards, slot)
        backward = self._take(self.backwards, slot)
        if backward:
            split = self.split and not forward and not self.forwards
            backward = backward._replace(kind=Kind.INPUT_GRAD if split else Kind.BACKWARD)
        if forward and backward:
            self.done.append(overlap(forward, backward))
        else:
            self.done.extend(part for part in (forward, backward) if part)
        return [self._outcome(part) for part in (forward, backward) if part]

    def _take(self, queue: deque[Action], slot: int) -> Action | None:
        """The next of `queue` if its data is there."""
        if queue:
            part = queue[0]
            key = (part.stage, part.microbatch, part.kind is not Kind.FORWARD)
            if self.ready_at.get(key, slot + 1) <= slot:
                return queue.popleft()
        return None

    def _outcome(self, part: Action) -> tuple[int, int, bool]:
        """Which input the part produces (of stage -1: none); the last forward starts its own backward."""
        if part.kind is Kind.FORWARD:
            at_end = part.stage == self.last_stage
            return (part.stage, part.microbatch, True) if at_end else (part.stage + 1, part.microbatch, False)
        return part.stage - 1, part.microbatch, True

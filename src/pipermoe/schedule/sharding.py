"""From a schedule of compute actions to one that also says when sharded weights are gathered and gradients reduced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipermoe.schedule.action import COMPUTE, WHOLE_STAGE, Action, Kind, Schedule


def with_reduction(schedule: Schedule) -> Schedule:
    """A REDUCE_GRAD of every stage on every rank that holds it, right after its last B or W there."""

    def order(actions: Sequence[Action]) -> Iterator[Action]:
        last = {
            part.stage: i
            for i, action in enumerate(actions)
            for part in action.parts
            if part.kind in (Kind.BACKWARD, Kind.WEIGHT_GRAD)
        }
        for i, action in enumerate(actions):
            yield action
            for stage in dict.fromkeys(part.stage for part in action.parts):
                if last.get(stage) == i:
                    yield Action(Kind.REDUCE, stage, WHOLE_STAGE)

    return replace(schedule, ranks=tuple(tuple(order(actions)) for actions in schedule.ranks))


def with_gathered_weights(schedule: Schedule, resident: int = 2) -> Schedule:
    """UNSHARD before a stage's weights are used and RESHARD when they make room (ZeRO-3).

    A rank holds the gathered weights of the stages that it uses next, at most `resident` (an overlapped pair of two
    stages needs two); a stage is gathered as soon as there is room, so the gathering runs ahead of its use.
    """

    def order(actions: Sequence[Action]) -> Iterator[Action]:
        gathered: list[int] = []
        upcoming = _stages_ahead(actions, resident)
        for action, wanted in zip(actions, upcoming, strict=True):
            for stage in [s for s in gathered if s not in wanted]:
                gathered.remove(stage)
                yield Action(Kind.RESHARD, stage, WHOLE_STAGE)
            for stage in wanted:
                if stage not in gathered:
                    gathered.append(stage)
                    yield Action(Kind.UNSHARD, stage, WHOLE_STAGE)
            yield action
        yield from (Action(Kind.RESHARD, stage, WHOLE_STAGE) for stage in gathered)

    return replace(schedule, ranks=tuple(tuple(order(actions)) for actions in schedule.ranks))


def _stages_ahead(actions: Sequence[Action], count: int) -> list[list[int]]:
    """For every position the first `count` different stages used from there on; all stages of the action at least."""
    ahead: list[list[int]] = []
    following: list[int] = []
    for action in reversed(actions):
        if action.kind in COMPUTE:
            own = list(dict.fromkeys(part.stage for part in action.parts))
            following = [*own, *(stage for stage in following if stage not in own)][: max(count, len(own))]
        ahead.append(following)
    return ahead[::-1]

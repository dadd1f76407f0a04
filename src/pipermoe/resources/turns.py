"""The order in which a stage works through its parts, alone or in a pair (`runtime.pipeline`: `stage`, `interleave`).

A forward or backward of a micro-batch is a sequence of steps; it yields where it has launched an all-to-all. What lies
between two yields is a turn. Of an overlapped pair turns of both alternate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from pipermoe.specs.mesh import split_layers


class Part(IntEnum):
    """What a stage is made of. A layer of multi-token prediction is a JOIN, a layer with experts and a HEAD."""

    MOE = 0
    DENSE = 1
    HEAD = 2
    EMBEDDING = 3
    JOIN = 4


class Leg(IntEnum):
    """The steps of a layer with experts; all other parts have one. Every leg but the last of each direction yields."""

    ATTEND = 0
    ROUTE = 1
    COMPUTE = 2
    MERGE = 3
    SPLIT = 4
    COMPUTE_BACK = 5
    ATTEND_BACK = 6


FORWARD_LEGS = (Leg.ATTEND, Leg.ROUTE, Leg.COMPUTE, Leg.MERGE)
BACKWARD_LEGS = (Leg.SPLIT, Leg.COMPUTE_BACK, Leg.ATTEND_BACK)


class Step(NamedTuple):
    """One step of part number `place` of a stage; `leg` None: all of the part."""

    part: Part
    place: int
    leg: Leg | None
    forward: bool

    @property
    def first(self) -> bool:
        """Whether the part begins with it."""
        return self.leg in (None, Leg.ATTEND, Leg.SPLIT)

    @property
    def last(self) -> bool:
        """Whether the part ends with it."""
        return self.leg in (None, Leg.MERGE, Leg.ATTEND_BACK)


class Turn(NamedTuple):
    """What runs until other work may come; a brief one computes next to nothing in the next."""

    steps: tuple[Step, ...]
    brief: bool


def parts_of_stages(
    layers: Sequence[bool], stages: int, split: tuple[int, ...], predictions: int
) -> list[tuple[Part, ...]]:
    """The parts of every stage in the order of a forward; `layers[i]` says whether layer i has experts."""
    ranges = split_layers(len(layers), stages, split)
    parts = [[Part.MOE if layers[layer] else Part.DENSE for layer in each] for each in ranges]
    parts[0].insert(0, Part.EMBEDDING)
    parts[-1] += [Part.HEAD, *(Part.JOIN, Part.MOE, Part.HEAD) * predictions]
    return [tuple(each) for each in parts]


def steps(parts: Sequence[Part], *, forward: bool) -> list[Step]:
    """A forward or backward with nothing beside it."""
    order = enumerate(parts) if forward else reversed(list(enumerate(parts)))
    return [Step(part, place, None, forward) for place, part in order]


def turns(parts: Sequence[Part], *, forward: bool) -> list[Turn]:
    """A forward or backward cut where it yields."""
    legs = FORWARD_LEGS if forward else BACKWARD_LEGS
    found, current = [], []
    for step in steps(parts, forward=forward):
        if step.part is not Part.MOE:
            current.append(step)
            continue
        for leg in legs:
            current.append(step._replace(leg=leg))
            if leg is not legs[-1]:
                found.append(Turn(tuple(current), brief=leg is Leg.ATTEND))
                current = []
    return [*found, Turn(tuple(current), brief=False)]


def in_turn(forward: Sequence[Turn], backward: Sequence[Turn]) -> Iterator[Step | None]:
    """The steps of a pair in their order; None is where the weight gradients run that the backward has left so far."""
    ahead, behind = list(forward[::-1]), list(backward[::-1])
    while ahead or behind:
        if behind:
            yield from behind.pop().steps
        if not behind:
            yield None
        brief = False
        if ahead:
            turn = ahead.pop()
            brief = turn.brief
            yield from turn.steps
        if not ahead or brief:
            yield None
        if brief:
            yield from ahead.pop().steps

"""Which units (a layer, embedding or head) are whole on a rank while it works, where ZeRO-2 and 3 shard them.

Weights are gathered as a forward or backward comes to a unit, with those of the next one, and two units stay.
Gradients are whole from a unit's first weight gradient until another unit's are reduced (`optimizer/sharding.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import copy
from enum import IntEnum
from itertools import chain, islice
from typing import NamedTuple

from pipermoe.resources.turns import Part, Step, in_turn, steps, turns
from pipermoe.schedule.action import Kind
from pipermoe.schedule.context import Context, Use

RESIDENT = 2  # units whose gathered weights stay

Units = Sequence[Sequence[str]]


class UnitKind(IntEnum):
    """In the order of StageShapes; a layer of multi-token prediction has more than its experts' layer."""

    MOE = 0
    DENSE = 1
    EMBEDDING = 2
    HEAD = 3
    PREDICTION = 4


class Sharded(NamedTuple):
    """The kinds of units whose weights are gathered, and whose gradients are reduced, for every use."""

    weights: frozenset[UnitKind] = frozenset()
    gradients: frozenset[UnitKind] = frozenset()


NOTHING_SHARDED = Sharded()


def units_of_stages(parts_of: Sequence[Sequence[Part]]) -> list[list[str]]:
    """The unit of every part of every stage: "embedding", "layers.0" and so on, "head".

    Multi-token prediction uses embedding and head again.
    """
    layer, found = 0, []
    for parts in parts_of:
        units = []
        for part in parts:
            if part in (Part.MOE, Part.DENSE):
                units.append(f"layers.{layer}")
                layer += 1
            else:
                units.append("head" if part is Part.HEAD else "embedding")
        found.append(units)
    return found


def kinds_of_units(parts_of: Sequence[Sequence[Part]]) -> dict[str, UnitKind]:
    """What each of them is."""
    kinds = {Part.MOE: UnitKind.MOE, Part.DENSE: UnitKind.DENSE, Part.HEAD: UnitKind.HEAD}
    found = {}
    for parts, units in zip(parts_of, units_of_stages(parts_of), strict=True):
        for place, (part, unit) in enumerate(zip(parts, units, strict=True)):
            joined = place > 0 and parts[place - 1] is Part.JOIN
            found[unit] = UnitKind.PREDICTION if joined else kinds.get(part, UnitKind.EMBEDDING)
    return found


class WholeWeights:
    """The `sharded` units whose weights are gathered on a rank: two, and those in use.

    Each is a flat buffer of its own name; a `tied` head needs the embedding's as well.
    """

    def __init__(self, sharded: Collection[str], here: Iterable[str] = (), *, tied: bool = False) -> None:
        self.sharded = sharded
        self.here = list(here)
        self._tied = tied
        self._whole = {flat for unit in self.here for flat in self._flats(unit)}
        self._in_use: dict[bool, str] = {}  # by direction: forward or not

    def begin(self, units: Sequence[str], step: Step) -> list[str]:
        """Before a step of a stage with these units: the buffers gathered for it, and for the next unit."""
        ahead, gathered = step.place + (1 if step.forward else -1), []
        if step.first:
            self._in_use.pop(step.forward, None)
            gathered += self._bring(units[step.place])
            self._in_use[step.forward] = units[step.place]
            if 0 <= ahead < len(units):
                gathered += self._bring(units[ahead])
        if step.last and not 0 <= ahead < len(units):
            del self._in_use[step.forward]
        return gathered

    def _flats(self, unit: str) -> tuple[str, ...]:
        return (unit, "embedding") if self._tied and unit == "head" else (unit,)

    def _bring(self, unit: str) -> list[str]:
        """What has to be gathered for it to be here."""
        if unit not in self.sharded:
            return []
        if unit in self.here:
            self.here.remove(unit)
        else:
            in_use = {flat for each in self._in_use.values() for flat in self._flats(each)}
            unused = [each for each in self.here if in_use.isdisjoint(self._flats(each))]
            for each in unused[: len(self.here) + 1 - RESIDENT]:
                self.here.remove(each)
                self._whole.difference_update(self._flats(each))
        self.here.append(unit)
        absent = [flat for flat in self._flats(unit) if flat not in self._whole]
        self._whole.update(absent)
        return absent


class WholeGradients:
    """The `sharded` units whose gradients are whole: those being filled, and the one whose reduction is under way."""

    def __init__(self, sharded: Collection[str], reducing: str | None = None) -> None:
        self.sharded = sharded
        self._filling: list[str] = []
        self._reducing = reducing

    @property
    def here(self) -> list[str]:
        return self._filling if self._reducing is None else [*self._filling, self._reducing]

    def begin(self, units: Sequence[str], step: Step) -> None:
        """Before the weight gradients of a backward's step are added."""
        if step.first and units[step.place] in self.sharded and units[step.place] not in self._filling:
            self._filling.append(units[step.place])

    def end(self, parts: Sequence[Part], units: Sequence[str], step: Step) -> None:
        """After them. A layer of multi-token prediction is ended by its join, which uses the embedding."""
        place = step.place
        if not step.last or (place and parts[place - 1] is Part.JOIN):
            return
        ended = (units[place], units[place + 1]) if parts[place] is Part.JOIN else (units[place],)
        for unit in ended:
            if unit in self.sharded:
                self._filling.remove(unit)
                self._reducing = unit


def steps_of_use(use: Use, parts_of: Sequence[Sequence[Part]]) -> Iterator[tuple[int, Step | None]]:
    """The steps of an action that uses weights, and their stages; None: where weight gradients run beside a pair."""
    if use.beside < 0:
        for step in steps(parts_of[use.stage], forward=use.kind is Kind.FORWARD):
            yield use.stage, step
        return
    for step in in_turn(turns(parts_of[use.beside], forward=True), turns(parts_of[use.stage], forward=False)):
        yield (use.beside if step is not None and step.forward else use.stage), step


class WholeUnits:
    """What is whole on a rank, step by step through one of its actions."""

    def __init__(self, parts_of: Sequence[Sequence[Part]], sharded: Sharded) -> None:
        self._parts_of, self._units_of, self._kinds = parts_of, units_of_stages(parts_of), kinds_of_units(parts_of)
        gathered, reduced = (frozenset(u for u, kind in self._kinds.items() if kind in each) for each in sharded)
        self._weights, self._gradients = WholeWeights(gathered), WholeGradients(reduced)
        self._gathered_by: dict[tuple[Use, ...], tuple[str, ...]] = {}
        self._waiting: Iterator[Step] = iter(())  # the steps whose weight gradients are to run beside a pair
        self._adding = -1
        self._owed = 0

    def before(self, context: Context) -> WholeUnits:
        """What is whole as an action begins."""
        found, uses = copy(self), context.uses
        if uses not in self._gathered_by:
            self._gathered_by[uses] = self._gathered(uses)
        units = self._units_of[context.added] if context.added >= 0 else []
        reducing = next((unit for unit in units if unit in self._gradients.sharded), None)
        found._weights = WholeWeights(self._weights.sharded, self._gathered_by[uses])
        found._gradients = WholeGradients(self._gradients.sharded, reducing)
        if context.adding >= 0:
            found._adding = context.adding
            order = turns(self._parts_of[context.adding], forward=False)
            found._waiting = chain.from_iterable(turn.steps for turn in order)
        return found

    def _gathered(self, uses: Iterable[Use]) -> tuple[str, ...]:
        """What these actions leave behind."""
        whole = WholeWeights(self._weights.sharded)
        for use in uses:
            for stage, step in steps_of_use(use, self._parts_of):
                if step is not None:
                    whole.begin(self._units_of[stage], step)
        return tuple(whole.here)

    @property
    def counts(self) -> list[int]:
        """Gathered weights and open gradients of every kind of unit, (2 * len(UnitKind),)."""
        found = [0] * (2 * len(UnitKind))
        for first, here in ((0, self._weights.here), (len(UnitKind), self._gradients.here)):
            for unit in here:
                found[first + self._kinds[unit]] += 1
        return found

    def use(self, stage: int, step: Step) -> None:
        """A step begins that uses weights."""
        self._weights.begin(self._units_of[stage], step)
        self._owed += not step.forward

    def fill(self, stage: int, step: Step) -> None:
        """The weight gradients of a step begin."""
        self._gradients.begin(self._units_of[stage], step)

    def reduce(self, stage: int, step: Step) -> None:
        """They have been added."""
        self._gradients.end(self._parts_of[stage], self._units_of[stage], step)

    def add_owed(self) -> None:
        """Beside a pair the weight gradients of as many steps run as its backward has made since."""
        for step in islice(self._waiting, self._owed):
            self.fill(self._adding, step)
            self.reduce(self._adding, step)
        self._owed = 0

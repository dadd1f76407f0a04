"""An account of the tensors of a piece of work, in the order in which it makes and frees them.

A script (`layers`, `ends`) says what is taken and dropped; the ledger says what is held at any time and at most.
Amounts are bytes and broadcast over strategies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import numpy as np

Birth = Literal["activations", "communication", "temporary"]
BIRTHS: tuple[Birth, ...] = ("activations", "communication", "temporary")


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes by where they were born: in a forward, in a collective's buffer, in a backward."""

    activations: Any = 0.0
    communication: Any = 0.0
    temporary: Any = 0.0

    @property
    def total(self) -> Any:
        return self.activations + self.communication + self.temporary

    def __add__(self, other: Held) -> Held:
        return Held(*(getattr(self, birth) + getattr(other, birth) for birth in BIRTHS))

    def __sub__(self, other: Held) -> Held:
        return Held(*(getattr(self, birth) - getattr(other, birth) for birth in BIRTHS))

    def where(self, mask: Any, other: Held) -> Held:
        """This one where `mask` is true, elsewhere the other."""
        return Held(*(np.where(mask, getattr(self, birth), getattr(other, birth)) for birth in BIRTHS))


NOTHING = Held()


def largest(*each: Held) -> Held:
    """Of every strategy the one that is most in all."""
    return reduce(lambda a, b: b.where(b.total > a.total, a), each)


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a piece of work between two places where other work may come.

    At most it holds `peak`, at its end `held`; weight gradients that it leaves for later hold `deferred` from then on,
    which is in the peak but not in `held`, and in no later step of this work.
    """

    peak: Held
    held: Held
    deferred: Held

    def where(self, mask: Any, other: Step) -> Step:
        return Step(
            self.peak.where(mask, other.peak),
            self.held.where(mask, other.held),
            self.deferred.where(mask, other.deferred),
        )


class Ledger:
    """What a piece of work holds, from `start` on; its tensors are born as `phase` unless said otherwise.

    With `defers`, weight gradients come later: what they read is released by the work but not free.
    """

    def __init__(self, phase: Birth, start: Held = NOTHING, *, defers: bool = False):
        self.phase, self.defers = phase, defers
        self.now, self.steps = start, []
        self._peak, self._deferred = start, NOTHING

    def take(self, *sizes: Any, of: Birth | None = None) -> None:
        """Tensors are made, one after another."""
        self._change(sum(sizes), of)
        self._peak = largest(self._peak, self.now + self._deferred)

    def drop(self, *sizes: Any, of: Birth | None = None) -> None:
        """Tensors are freed."""
        self._change(-sum(sizes), of)

    def brief(self, *sizes: Any) -> None:
        """Tensors are made and freed before anything else is."""
        self.take(*sizes)
        self.drop(*sizes)

    def free(self, size: Any, rebuilt: Any) -> None:
        """Drop what was kept from the forward, or where `rebuilt` made again."""
        self.drop(size * (1 - rebuilt), of="activations")
        self.drop(size * rebuilt)

    def release(self, *sizes: Any, of: Birth | None = None) -> None:
        """Drop what nothing but weight gradients reads from now on."""
        self.drop(*sizes, of=of)
        if self.defers:
            birth = of or self.phase
            self._deferred = replace(self._deferred, **{birth: getattr(self._deferred, birth) + sum(sizes)})

    def release_kept(self, size: Any, rebuilt: Any) -> None:
        """Release what was kept from the forward, or where `rebuilt` made again."""
        self.release(size * (1 - rebuilt), of="activations")
        self.release(size * rebuilt)

    def end_step(self) -> None:
        """Other work may come here."""
        self.steps.append(Step(self._peak, self.now, self._deferred))
        self._peak, self._deferred = self.now, NOTHING

    def _change(self, size: Any, of: Birth | None) -> None:
        birth = of or self.phase
        self.now = replace(self.now, **{birth: getattr(self.now, birth) + size})


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """A layer or an end of the model: its forward, the same backward with its weight gradients at once and for later.

    `kept` stays from forward to backward. A weight gradient makes `product` on its way to where it is added.
    """

    kept: Held
    forward: tuple[Step, ...]
    full: tuple[Step, ...]
    deferring: tuple[Step, ...]
    product: Held = NOTHING

    @property
    def deferred(self) -> Held:
        """What weight gradients hold from I to W."""
        return sum((step.deferred for step in self.deferring), NOTHING)

    def where(self, mask: Any, other: BlockMemory) -> BlockMemory:
        """This one where `mask` is true, elsewhere the other."""
        steps = (
            tuple(a.where(mask, b) for a, b in zip(getattr(self, name), getattr(other, name), strict=True))
            for name in ("forward", "full", "deferring")
        )
        return BlockMemory(self.kept.where(mask, other.kept), *steps, product=self.product.where(mask, other.product))


def alone(steps: tuple[Step, ...]) -> Held:
    """The most that work holds when nothing comes between its steps."""
    waiting, peaks = NOTHING, []
    for step in steps:
        peaks.append(step.peak + waiting)
        waiting = waiting + step.deferred
    return largest(*peaks)

"""An account of the tensors of a piece of work, in the order in which it makes and frees them.

A script (`layers`, `ends`) says what is taken and dropped; the ledger says what is held at any time and at most.
Amounts are bytes and broadcast over strategies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import add
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

    def more(self, size: Any, birth: Birth) -> Held:
        """With `size` bytes born so; fewer if it is negative."""
        return replace(self, **{birth: getattr(self, birth) + size})

    def __add__(self, other: Held) -> Held:
        return Held(*(getattr(self, birth) + getattr(other, birth) for birth in BIRTHS))

    def where(self, mask: Any, other: Held) -> Held:
        """This one where `mask` is true, elsewhere the other."""
        return Held(*(np.where(mask, getattr(self, birth), getattr(other, birth)) for birth in BIRTHS))

    def or_larger(self, other: Held) -> Held:
        """The other where it is more in all."""
        return other.where(other.total > self.total, self)


@dataclass(frozen=True, slots=True)
class Total:
    """The same where nobody asks how they were born: a third of the work."""

    total: Any = 0.0

    def more(self, size: Any, birth: Birth) -> Total:
        return Total(self.total + size)

    def __add__(self, other: Total) -> Total:
        return Total(self.total + other.total)

    def where(self, mask: Any, other: Total) -> Total:
        return Total(np.where(mask, self.total, other.total))

    def or_larger(self, other: Total) -> Total:
        return Total(np.maximum(self.total, other.total))


Amount = Any  # Held or Total, one of them in all of an account
BY_BIRTH, IN_ALL = Held(), Total()  # nothing yet, of either


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a piece of work between two places where other work may come.

    At most it holds `peak`, at its end `held`; weight gradients that it leaves for later hold `deferred` from then on,
    which is in the peak but not in `held`, and in no later step of this work.
    """

    peak: Amount
    held: Amount
    deferred: Amount

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

    def __init__(self, phase: Birth, start: Amount = BY_BIRTH, *, defers: bool = False):
        self.phase, self.defers = phase, defers
        self.now, self.steps = start, []
        self._peak, self._deferred = start, type(start)()

    def take(self, *sizes: Any, of: Birth | None = None) -> None:
        """Tensors are made, one after another."""
        self._change(sum(sizes), of)
        self._peak = self._peak.or_larger(self.now + self._deferred)

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
            self._deferred = self._deferred.more(sum(sizes), of or self.phase)

    def release_kept(self, size: Any, rebuilt: Any) -> None:
        """Release what was kept from the forward, or where `rebuilt` made again."""
        self.release(size * (1 - rebuilt), of="activations")
        self.release(size * rebuilt)

    def end_step(self) -> None:
        """Other work may come here."""
        self.steps.append(Step(self._peak, self.now, self._deferred))
        self._peak, self._deferred = self.now, type(self.now)()

    def _change(self, size: Any, of: Birth | None) -> None:
        self.now = self.now.more(size, of or self.phase)


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """A layer or an end of the model: its forward, the same backward with its weight gradients at once and for later.

    `kept` stays from forward to backward. A weight gradient makes `product` on its way to where it is added.
    """

    kept: Amount
    forward: tuple[Step, ...]
    full: tuple[Step, ...]
    deferring: tuple[Step, ...]
    product: Amount

    @property
    def deferred(self) -> Amount:
        """What weight gradients hold from I to W."""
        return reduce(add, (step.deferred for step in self.deferring))

    def where(self, mask: Any, other: BlockMemory) -> BlockMemory:
        """This one where `mask` is true, elsewhere the other."""
        steps = (
            tuple(a.where(mask, b) for a, b in zip(getattr(self, name), getattr(other, name), strict=True))
            for name in ("forward", "full", "deferring")
        )
        return BlockMemory(self.kept.where(mask, other.kept), *steps, product=self.product.where(mask, other.product))


def alone(steps: tuple[Step, ...]) -> Amount:
    """The most that work holds when nothing comes between its steps."""
    most, waiting = steps[0].peak, steps[0].deferred
    for step in steps[1:]:
        most, waiting = most.or_larger(step.peak + waiting), waiting + step.deferred
    return most

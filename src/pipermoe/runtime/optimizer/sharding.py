"""ZeRO: which parameters lie in one flat buffer, and when those of a layer are gathered and their gradients reduced.

Each layer has buffers of its own, as have the embedding and the head. Up to level 1 gradients are reduced once a step,
as soon as the last backward has filled them; from level 2 they exist whole only while a backward fills them, and at
level 3 weights only while they are used. Dense parameters are sharded over dp, routed experts over edp, each at a level
of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from pipermoe.modules.names import is_expert, unit_of
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.optimizer.flat_parameters import FlatParameters, Landed
from pipermoe.runtime.optimizer.lent_weights import LentWeights
from pipermoe.runtime.trace import REDUCE
from pipermoe.specs.strategy import Strategy

RESIDENT = 2  # layers whose gathered weights stay: the one in use, and the next one on its way or the last one used


def flatten(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    groups: ProcessGroups,
    strategy: Strategy,
    copied: Collection[str] = (),
) -> list[FlatParameters]:
    """Lay the parameters of a rank in flat buffers, which own their storage from then on. Collective over no group.

    Both ends of the pipeline hold the `copied` parameters.
    """
    units: dict[tuple[bool, str], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in named_parameters:
        units[is_expert(name), unit_of(name)].append((name, parameter))
    return [
        FlatParameters(held, groups.edp, strategy.zero_expert, static_experts(held, groups))
        if expert
        else FlatParameters(held, groups.dp, strategy.zero_dense, ends=groups.ends if held[0][0] in copied else None)
        for (expert, _), held in sorted(units.items(), key=lambda item: item[0][0])
    ]


def static_experts(named_parameters: Sequence[tuple[str, Tensor]], groups: ProcessGroups) -> range:
    """The logical experts of a rank where every rank holds the same number, in order."""
    local = len(named_parameters[0][1])
    return range(groups.coordinates.ep * local, (groups.coordinates.ep + 1) * local)


class Unit(Protocol):
    """Weights that may be whole only while they are used, and gradients only while a backward fills them."""

    @property
    def unit(self) -> str: ...
    @property
    def gathers(self) -> bool: ...
    @property
    def scatters(self) -> bool: ...
    @property
    def lent(self) -> LentWeights: ...
    def launch_gather(self) -> None: ...
    def keep_shard(self) -> None: ...
    def open_gradients(self) -> None: ...
    def launch_reduction(self, landed: Landed = ...) -> None: ...
    def settle_reduction(self) -> Tensor | None: ...


class Sharding:
    """Brings the weights of one unit after another, and takes their gradients away. The order is the caller's, so it
    is the same on all ranks of a group as long as the schedule is.

    Weights stay until room is needed for others: the layer that a forward ends with is the one its backward begins
    with. Of gradients that are whole for a while at most one reduction is in flight while the next unit's are being
    filled; those that stay are all in flight behind the last backwards of a step.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._gathered: dict[str, list[Unit]] = defaultdict(list)
        self._scattered: dict[str, list[Unit]] = defaultdict(list)
        self._here: list[str] = []  # gathered units, the one used last at the end
        self._reducing: list[Unit] = []
        self._staying: dict[str, list[FlatParameters]] = defaultdict(list)
        self._fills: Counter[FlatParameters] = Counter()  # how often a step fills the gradients of each that stays
        self._left: Counter[FlatParameters] = Counter()  # of these, how often this step has yet to

    def take(self, flats: Iterable[Unit], *, tied: bool = False) -> None:
        """Take charge of these; with `tied` word embeddings the head uses the embedding's weights too."""
        for flat in flats:
            if flat.gathers:
                self._gathered[flat.unit].append(flat)
            if flat.scatters:
                self._scattered[flat.unit].append(flat)
        if tied:
            for units in (self._gathered, self._scattered):
                units["head"] = units["head"] + units["embedding"]

    def reduce_early(self, flats: Iterable[FlatParameters], fills: Iterable[str], *, tied: bool = False) -> None:
        """Reduce the gradients that stay of these as soon as the last of a step's `fills`, units, has filled them."""
        for flat in flats:
            if not flat.scatters and flat.ranks > 1:
                self._staying[flat.unit].append(flat)
        if tied:
            self._staying["head"] = self._staying["head"] + self._staying["embedding"]
        for unit in fills:
            self._fills.update(self._staying.get(unit, ()))
        self._left = self._fills.copy()

    @property
    def scatters_any(self) -> bool:
        return any(self._scattered.values())

    def scatters(self, unit: str) -> bool:
        """Whether the gradients of `unit` exist whole only while a backward fills them."""
        return bool(self._scattered.get(unit))

    def stays(self, unit: str) -> bool:
        """Whether gradients of `unit` stay and are reduced with the last of a step's backwards."""
        return bool(self._staying.get(unit))

    @contextmanager
    def weights(self, unit: str, following: str | None = None) -> Iterator[None]:
        """The parameters of `unit` hold their weights in this block; those of the `following` one set out."""
        held = self._gathered.get(unit, ())
        self._gather(unit)
        for flat in held:
            flat.lent.acquire()
        if following is not None:
            self._gather(following)
        with self._meter.term("gradient_sync"):
            for flat in held:
                flat.lent.wait()
        try:
            yield
        finally:
            for flat in held:
                flat.lent.release()

    def _gather(self, unit: str) -> None:
        if not self._gathered.get(unit):
            return
        if unit in self._here:
            self._here.remove(unit)
        else:
            unused = [each for each in self._here if not any(flat.lent.in_use for flat in self._gathered[each])]
            for each in unused[: len(self._here) + 1 - RESIDENT]:
                self._drop(each)
        self._here.append(unit)
        with self._meter.born("communication"):
            for flat in self._gathered[unit]:
                flat.launch_gather()

    def _drop(self, unit: str) -> None:
        self._here.remove(unit)
        for flat in self._gathered[unit]:
            dropped = flat.lent.drop()
            if dropped is not None:
                self._meter.release(dropped)

    @contextmanager
    def lent(self, unit: str) -> Iterator[None]:
        """The parameters of `unit` hold their weights in this block, and what is written into them is kept."""
        with self.weights(unit):
            yield
            for flat in self._gathered.get(unit, ()):
                flat.keep_shard()

    def open_gradients(self, unit: str) -> None:
        """Let the parameters of `unit` receive gradients."""
        with self._meter.born("communication"):
            for flat in self._scattered[unit]:
                flat.open_gradients()

    def reduce_gradients(self, unit: str) -> None:
        """Start to sum the gradients of `unit` over its ranks, and finish what was started before."""
        self._settle_reductions()
        self._reducing = self._scattered[unit]
        for flat in self._reducing:
            flat.launch_reduction(self._meter.launched(REDUCE))

    def filled(self, unit: str) -> None:
        """One more backward has filled the gradients of `unit` that stay; start to sum them if it was the last."""
        for flat in self._staying[unit]:
            self._left[flat] -= 1
            if not self._left[flat]:
                self._left[flat] = self._fills[flat]
                flat.launch_reduction(self._meter.launched(REDUCE))

    def _settle_reductions(self) -> None:
        with self._meter.term("gradient_sync"):
            for flat in self._reducing:
                reduced = flat.settle_reduction()
                if reduced is not None:
                    self._meter.release(reduced)
        self._reducing = []

    def settle(self) -> None:
        """End a pass over the model: gradients are in their shards, gathered weights are gone (they get updated)."""
        self._settle_reductions()
        for unit in list(self._here):
            self._drop(unit)

"""Which plan for which bytes: the one with the least predicted time, corrected by what was measured before."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pipermoe.exchange.builders import BUILDERS
from pipermoe.exchange.cost import plan_seconds
from pipermoe.exchange.plan import ExchangePlan, Ints, byte_matrix
from pipermoe.exchange.topology import Topology

MOST_RANKS_FOR_ROUNDS = 32  # decomposing a matrix into permutations takes seconds beyond
LEAST_SECONDS = 1e-9  # where the topology has no bandwidths, all plans cost this and experience decides
SKEWED = 1.25  # busiest rank / mean, from which on balancing is considered


@dataclass(frozen=True, slots=True)
class Choice:
    """A builder and its parameters."""

    builder: str
    parameters: tuple[tuple[str, int], ...] = ()

    def plan(self, counts: Ints, topology: Topology) -> ExchangePlan:
        return BUILDERS[self.builder](counts, topology, **dict(self.parameters))

    def __str__(self) -> str:
        return ":".join([self.builder, *(f"{key}={value}" for key, value in self.parameters)])


def candidates(counts: Ints, topology: Topology) -> list[Choice]:
    """The plans worth a price. `direct` comes first: what others must beat."""
    choices = [Choice("direct")]
    if topology.num_groups > 1:
        choices.append(Choice("group_aware"))
    if 1 < topology.num_nodes < topology.num_ranks:
        choices += [Choice("hierarchical"), Choice("mirrored"), Choice("one_leader"), Choice("nic_balanced")]
        choices.append(Choice("nic_balanced", (("chunk_bytes", 1 << 20),)))
    if topology.num_ranks > 2:
        choices.append(Choice("log_step"))
    if topology.num_ranks <= MOST_RANKS_FOR_ROUNDS and _skew(counts) > SKEWED:
        choices.append(Choice("balanced_rounds"))
    return choices


@dataclass
class Chooser:
    """Chooses for one topology. Equal memories choose equally, so ranks that record the same times agree.

    `memory` holds, per choice and class of byte matrices (powers of two of the mean bytes per pair and of the skew),
    measured / predicted seconds. A choice with no memory of a class takes that of its nearest class, then 1.
    """

    topology: Topology
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    chosen: dict[str, Choice] = field(default_factory=dict)

    def choose(self, counts: ArrayLike) -> Choice:
        counts = byte_matrix(counts)
        key = class_of(counts)
        if key not in self.chosen:
            choices = candidates(counts, self.topology)
            prices = [self.predict(choice, counts) for choice in choices]
            self.chosen[key] = choices[int(np.argmin(prices))]
        return self.chosen[key]

    def predict(self, choice: Choice, counts: Ints) -> float:
        """Seconds, by the cost model and by experience."""
        return self._price(choice, counts) * self._correction(str(choice), class_of(counts))

    def _price(self, choice: Choice, counts: Ints) -> float:
        return max(plan_seconds(choice.plan(counts, self.topology), self.topology), LEAST_SECONDS)

    def record(self, choice: Choice, counts: ArrayLike, seconds: float) -> None:
        """Learns a measured time; it must be the same on all ranks (the slowest rank's)."""
        counts = byte_matrix(counts)
        key = class_of(counts)
        self.memory.setdefault(str(choice), {})[key] = seconds / self._price(choice, counts)
        self.chosen.pop(key, None)

    def _correction(self, choice: str, key: str) -> float:
        known = self.memory.get(choice, {})
        if not known:
            return 1.0
        size, skew = map(int, key.split("/"))
        nearest = min(known, key=lambda other: _distance(other, size, skew))
        return known[nearest]

    def to_json(self) -> str:
        return json.dumps(self.memory, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, topology: Topology) -> Chooser:
        memory: Any = json.loads(text)
        return cls(topology, {choice: {key: float(v) for key, v in known.items()} for choice, known in memory.items()})


def class_of(counts: Ints) -> str:
    """`16/1`: mean bytes per pair near 2^16, busiest rank near 2^1 times the mean."""
    mean = counts.sum() / max(counts.size, 1)
    return f"{round(math.log2(mean)) if mean else 0}/{round(math.log2(_skew(counts)))}"


def _distance(key: str, size: int, skew: int) -> int:
    other_size, other_skew = map(int, key.split("/"))
    return abs(other_size - size) + 2 * abs(other_skew - skew)


def _skew(counts: Ints) -> float:
    """Busiest rank (sent or received) over the mean, at least 1."""
    mean = counts.sum() / len(counts)
    return float(max(counts.sum(axis=0).max(), counts.sum(axis=1).max()) / mean) if mean else 1.0

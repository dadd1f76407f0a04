"""StepReport: what one training step costs. The resource model predicts one, a run measures one.

Because prediction and measurement are the same type, a term that exists on one side only cannot exist.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import chain, islice
from operator import attrgetter
from typing import Any, Literal

from pydantic import field_serializer, field_validator

from pipermoe.specs.base import Frozen
from pipermoe.specs.units import format_ranges, parse_ranges

Term = Literal["forward", "backward", "all_to_all", "pipeline_wait", "gradient_sync", "optimizer", "other"]
TERMS: tuple[Term, ...] = (
    "forward",  # computing forward actions
    "backward",  # computing backward actions
    "all_to_all",  # waiting for dispatch and combine, the count exchange included
    "pipeline_wait",  # waiting for another stage: the bubble and exposed point-to-point transfers
    "gradient_sync",  # reducing gradients, norms and flags over ranks; gathering sharded weights
    "optimizer",  # clipping and updating
    "other",  # the rest: loading the batch, Python between actions
)

# Weights, gradients and optimizer state by what they are; every other tensor by where it is born: `communication`
# buffers of collectives, `activations` in forward actions, `temporary` in backward actions, reductions, the optimizer.
MemoryCategory = Literal["weights", "gradients", "optimizer", "activations", "communication", "temporary"]
MEMORY_CATEGORIES: tuple[MemoryCategory, ...] = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "communication",
    "temporary",
)

MOST_RANKS = 1 << 20  # in a file: more are a mistake


class Traffic(Frozen):
    """Calls of one collective on one rank in one step and the bytes it hands to the network.

    All-to-all and send: bytes that leave the rank. All-reduce: bytes of the tensor. Reduce-scatter: bytes of the input.
    All-gather: bytes of the output.
    """

    calls: int
    bytes: int


class RankReport(Frozen):
    """One rank in one step. `traffic` is keyed "collective.axis", for example "all_to_all.ep" or "send.pp"."""

    rank: int
    peak_bytes: int
    memory_bytes: dict[MemoryCategory, int]
    flops: int
    traffic: dict[str, Traffic]
    seconds: dict[Term, float]

    def figures(self) -> Hashable:
        """All but the number of the rank."""
        traffic = tuple((key, sent.calls, sent.bytes) for key, sent in self.traffic.items())
        parts = tuple(self.memory_bytes.items()), tuple(self.seconds.items())
        return self.peak_bytes, self.flops, traffic, parts


class StepReport(Frozen):
    """One step of the whole job; `ranks` in rank order. Seconds are per step, `step_seconds` on the wall clock.

    In a file ranks that are alike are one entry, whose `rank` lists them: "0-511, 1024-1535".
    """

    step_seconds: float
    ranks: tuple[RankReport, ...]

    @field_serializer("ranks")
    def _alike_as_one(self, ranks: tuple[RankReport, ...]) -> list[dict[str, Any]]:
        alike: dict[Hashable, list[RankReport]] = {}
        for rank in ranks:
            alike.setdefault(rank.figures(), []).append(rank)
        numbers = ([rank.rank for rank in same] for same in alike.values())
        named = (each[0] if len(each) == 1 else format_ranges(each) for each in numbers)
        firsts = (same[0].model_dump(mode="json") for same in alike.values())
        return [first | {"rank": name} for first, name in zip(firsts, named, strict=True)]

    @field_validator("ranks", mode="before")
    @classmethod
    def _each_by_itself(cls, entries: Any) -> Any:
        if not isinstance(entries, (list, tuple)):
            return entries
        return list(islice(chain.from_iterable(map(_listed, entries)), MOST_RANKS + 1))

    @field_validator("ranks")
    @classmethod
    def _in_order(cls, ranks: tuple[RankReport, ...]) -> tuple[RankReport, ...]:
        ordered = tuple(sorted(ranks, key=attrgetter("rank")))
        if [each.rank for each in ordered] != list(range(len(ordered))):
            raise ValueError("must name every rank once, from 0 on")
        return ordered

    def mean_seconds(self, term: Term) -> float:
        """The mean of a term over ranks: the terms' means add up to the step time."""
        return sum(rank.seconds.get(term, 0.0) for rank in self.ranks) / len(self.ranks)


def _listed(entry: Any) -> list[Any]:
    """An entry of a file as one for each rank that it lists."""
    if not (isinstance(entry, dict) and isinstance(entry.get("rank"), str)):
        return [entry]
    first = RankReport.model_validate(entry | {"rank": 0})
    return [first.model_copy(update={"rank": number}) for number in parse_ranges(entry["rank"], MOST_RANKS)]

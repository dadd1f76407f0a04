"""Schedule and Action: the order of work on every pipeline rank, as data. One of the four decisions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an action does with one micro-batch on one stage."""

    FORWARD = "F"
    BACKWARD = "B"  # input and weight gradient together
    INPUT_GRAD = "I"
    WEIGHT_GRAD = "W"
    SEND_FORWARD = "SEND_F"  # this stage's output to the next stage
    RECV_FORWARD = "RECV_F"  # this stage's input from the stage before
    SEND_BACKWARD = "SEND_B"  # the gradient of this stage's input to the stage before
    RECV_BACKWARD = "RECV_B"  # the gradient of this stage's output from the next stage


@dataclass(frozen=True, slots=True)
class Action:
    """One unit of work of a pipeline rank on (stage, microbatch)."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """For every pipeline rank the ordered actions; `stage_rank[s]` is the pipeline rank that holds stage s."""

    name: str
    microbatches: int
    stage_rank: tuple[int, ...]
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        return len(self.stage_rank)

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    @classmethod
    def of(cls, name: str, microbatches: int, stage_rank: Iterable[int], ranks: Iterable[Iterable[Action]]) -> Schedule:
        return cls(name, microbatches, tuple(stage_rank), tuple(tuple(actions) for actions in ranks))

    def __str__(self) -> str:
        return "\n".join(" ".join(str(action) for action in actions) for actions in self.ranks)

"""Schedule and Action: the order of work on every pipeline rank, as data. One of the four decisions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """What an action does with one micro-batch on one stage; the last three act on the stage as a whole."""

    FORWARD = "F"
    BACKWARD = "B"  # input and weight gradient together
    INPUT_GRAD = "I"
    WEIGHT_GRAD = "W"
    SEND_FORWARD = "SEND_F"  # this stage's output to the next stage
    RECV_FORWARD = "RECV_F"  # this stage's input from the stage before
    SEND_BACKWARD = "SEND_B"  # the gradient of this stage's input to the stage before
    RECV_BACKWARD = "RECV_B"  # the gradient of this stage's output from the next stage
    OVERLAP = "OVERLAP_F_B"  # a forward beside the backward of another micro-batch: see Action.parts
    UNSHARD = "UNSHARD"  # gather the stage's sharded weights
    RESHARD = "RESHARD"  # drop the gathered copy
    REDUCE = "REDUCE_GRAD"  # reduce the stage's gradients over its replicas

    __hash__ = str.__hash__  # an Enum hashes in Python, and every look-up of an action hashes its kind


COMPUTE = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD, Kind.OVERLAP})
SENDS = frozenset({Kind.SEND_FORWARD, Kind.SEND_BACKWARD})
RECEIVES = frozenset({Kind.RECV_FORWARD, Kind.RECV_BACKWARD})
SHARDING = frozenset({Kind.UNSHARD, Kind.RESHARD, Kind.REDUCE})
WHOLE_STAGE = -1  # the micro-batch of an action on the stage as a whole


class Action(NamedTuple):
    """One unit of work of a pipeline rank on (stage, microbatch).

    An overlapped pair is one action of kind OVERLAP that names its forward and its backward in `pair`, in that order;
    its own stage and micro-batch are the forward's. Readers go over `parts` and never need to ask.
    """

    kind: Kind
    stage: int
    microbatch: int
    pair: tuple[Action, ...] = ()

    @property
    def parts(self) -> tuple[Action, ...]:
        """The elementary actions: the forward and the backward of a pair, otherwise the action itself."""
        return self.pair or (self,)

    def __str__(self) -> str:
        if self.pair:
            return f"({';'.join(map(str, self.pair))}){self.kind}"
        return f"{self.stage}{self.kind}{self.microbatch}" if self.microbatch >= 0 else f"{self.stage}{self.kind}"


def overlap(forward: Action, backward: Action) -> Action:
    """`forward` and `backward`, of different micro-batches, run beside each other."""
    return Action(Kind.OVERLAP, forward.stage, forward.microbatch, (forward, backward))


@dataclass(frozen=True, slots=True)
class Schedule:
    """For every pipeline rank the ordered actions; `stage_rank[s]` is the pipeline rank that holds stage s.

    Bidirectional schedules (DualPipe) hold a second copy of every stage: `mirror_rank[s]` is its rank, and it serves
    the odd micro-batches. Everywhere else `mirror_rank` is empty. `rank_of` answers for both.
    """

    name: str
    microbatches: int
    stage_rank: tuple[int, ...]
    ranks: tuple[tuple[Action, ...], ...]
    mirror_rank: tuple[int, ...] = ()

    @property
    def num_stages(self) -> int:
        return len(self.stage_rank)

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The pipeline rank on which `stage` works on `microbatch`."""
        return self.mirror_rank[stage] if self.mirror_rank and microbatch % 2 else self.stage_rank[stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages whose weights `rank` holds, ascending."""
        return tuple(
            stage
            for stage in range(self.num_stages)
            if self.stage_rank[stage] == rank or (self.mirror_rank and self.mirror_rank[stage] == rank)
        )

    def parts(self, rank: int) -> Iterator[Action]:
        """The elementary actions of `rank` in order, overlapped pairs taken apart."""
        return (part for action in self.ranks[rank] for part in action.parts)

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are actions of their own."""
        return any(part.kind is Kind.WEIGHT_GRAD for rank in range(self.num_ranks) for part in self.parts(rank))

    @classmethod
    def of(
        cls,
        name: str,
        microbatches: int,
        stage_rank: Iterable[int],
        ranks: Iterable[Iterable[Action]],
        mirror_rank: Iterable[int] = (),
    ) -> Schedule:
        return cls(name, microbatches, tuple(stage_rank), tuple(map(tuple, ranks)), tuple(mirror_rank))

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, actions)) for actions in self.ranks)


def source_of(schedule: Schedule, part: Action) -> tuple[int, int] | None:
    """Where a compute action's data comes from, as (stage, rank): its input or the gradient of its output.

    None when it needs nothing from another stage: the first stage's forward, the last stage's backward, a weight
    gradient.
    """
    if part.kind is Kind.FORWARD and part.stage > 0:
        source = part.stage - 1
    elif part.kind in (Kind.BACKWARD, Kind.INPUT_GRAD) and part.stage < schedule.num_stages - 1:
        source = part.stage + 1
    else:
        return None
    return source, schedule.rank_of(source, part.microbatch)

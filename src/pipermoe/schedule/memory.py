"""How many activations a schedule keeps alive. The order alone decides it: no durations are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipermoe.schedule.action import Action, Kind, Schedule


@dataclass(frozen=True, slots=True)
class InFlight:
    """Peak number of micro-batches whose activations are alive, from the start of F to the end of B or W.

    `stage[s]` for one stage, `rank[r]` for all stages of a pipeline rank together (one per stage and micro-batch).
    """

    stage: tuple[int, ...]
    rank: tuple[int, ...]


def in_flight(schedule: Schedule) -> InFlight:
    """Peak activations in flight per stage and per rank; a copy of a stage (DualPipe) counts for that stage."""
    per_stage = [0] * schedule.num_stages
    per_rank = []
    for rank in range(schedule.num_ranks):
        alive = [0] * schedule.num_stages
        total = peak = 0
        for part in schedule.parts(rank):  # of a pair the forward comes first: both micro-batches are alive together
            change = 1 if part.kind is Kind.FORWARD else -1 if ends_life(part) else 0
            alive[part.stage] += change
            total += change
            per_stage[part.stage] = max(per_stage[part.stage], alive[part.stage])
            peak = max(peak, total)
        per_rank.append(peak)
    return InFlight(tuple(per_stage), tuple(per_rank))


def ends_life(part: Action) -> bool:
    """Whether the activations of the part's micro-batch are free after it."""
    return part.kind in (Kind.BACKWARD, Kind.WEIGHT_GRAD)


def peak_activation_bytes(
    schedule: Schedule, stage_bytes: Sequence[float], weight_grad_bytes: Sequence[float] | None = None
) -> tuple[float, ...]:
    """Peak bytes of activations per pipeline rank.

    `stage_bytes[s]` is what one micro-batch keeps on stage s from its forward on; `weight_grad_bytes[s]` the part of it
    that the weight gradient still needs after the input gradient (default: all of it).
    """
    kept = stage_bytes if weight_grad_bytes is None else weight_grad_bytes
    peaks = []
    for rank in range(schedule.num_ranks):
        held = peak = 0.0
        for part in schedule.parts(rank):
            if part.kind is Kind.FORWARD:
                held += stage_bytes[part.stage]
                peak = max(peak, held)
            elif part.kind is Kind.INPUT_GRAD:
                held -= stage_bytes[part.stage] - kept[part.stage]
            elif part.kind is Kind.WEIGHT_GRAD:
                held -= kept[part.stage]
            elif part.kind is Kind.BACKWARD:
                held -= stage_bytes[part.stage]
        peaks.append(peak)
    return tuple(peaks)

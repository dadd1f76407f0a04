"""What ranks hold while they work: the columns of counts against sets of what is there, action by action."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from tests.schedule.grids import SLOWLY, pipelines

from pipermoe.schedule.action import COMPUTE, RECEIVES, Action, Kind, Schedule
from pipermoe.schedule.arrivals import acknowledgements
from pipermoe.schedule.builders import RECIPES, build
from pipermoe.schedule.communication import receive_of, send_of, with_communication
from pipermoe.schedule.context import NO_CONTEXT
from pipermoe.schedule.occupancy import growth, occupancies

BACKWARDS = (Kind.BACKWARD, Kind.INPUT_GRAD)
Passing = tuple[str, int, int]  # an input of a stage and micro-batch, "F" or "B"


def held(schedule: Schedule, rank: int) -> Iterator[tuple[tuple, tuple[int, ...]]]:
    """(work, counts) of every action of `rank`, with what it holds written out as sets."""
    arrived, stages = acknowledgements(schedule, rank), schedule.stages_of(rank)
    kept: set[tuple[int, int]] = set()
    deferred: set[tuple[int, int]] = set()
    outputs: set[Passing] = set()
    gradients: set[Passing] = set()
    incoming: set[Passing] = set()
    came: set[tuple[int, int]] = set()

    def begin(part: Action) -> None:
        here = (part.stage, part.microbatch)
        if part.kind is Kind.FORWARD:
            kept.add(here)
            incoming.discard(("F", *here))
            if receive_of(schedule, part, rank):
                came.add(here)
            if part.stage < schedule.num_stages - 1:
                outputs.add(("F", part.stage + 1, part.microbatch))

    def end(part: Action) -> None:
        here, sent = (part.stage, part.microbatch), send_of(schedule, part, rank)
        after = (
            ("F", part.stage + 1, part.microbatch)
            if part.kind is Kind.FORWARD
            else ("B", part.stage - 1, part.microbatch)
        )
        if part.kind in BACKWARDS:
            kept.remove(here)
            came.discard(here)
            incoming.discard(("B", *here))
            if part.kind is Kind.INPUT_GRAD:
                deferred.add(here)
            if sent:
                gradients.add(after)
        if part.kind is Kind.WEIGHT_GRAD:
            deferred.discard(here)
        elif not sent and 0 <= after[1] < schedule.num_stages:
            outputs.discard(after)
            incoming.add(after)

    actions = list(schedule.ranks[rank])
    weights = [(action.stage, action.microbatch) for action in actions if action.kind is Kind.WEIGHT_GRAD]
    for i, action in enumerate(actions):
        if action.kind in COMPUTE:
            for part in action.parts:
                begin(part)
            after = next((n for n in range(i + 1, len(actions)) if actions[n].kind in COMPUTE), len(actions))
            posted = sum(each.kind in RECEIVES for each in actions[i:after])
            work = (
                rank,
                action.parts[-1].kind,
                action.parts[-1].stage,
                action.stage if action.pair else -1,
                NO_CONTEXT,
            )
            chunks = [sum(s == stage for s, _ in each) for each in (kept, deferred) for stage in stages]
            if action.kind is not Kind.WEIGHT_GRAD or (action.stage, action.microbatch) in deferred:
                yield work, (*chunks, len(outputs), len(gradients), len(incoming) + posted, len(came))
            for part in action.parts:
                end(part)
            if action.pair and deferred:  # as many weight gradients have run as the pair has left behind
                deferred.remove(next(here for here in weights if here in deferred))
        elif action.kind in RECEIVES:
            incoming.add(("F" if action.kind is Kind.RECV_FORWARD else "B", action.stage, action.microbatch))
        for send in arrived.get(action, ()):
            forward = send.kind is Kind.SEND_FORWARD
            if forward:
                outputs.remove(("F", send.stage + 1, send.microbatch))
            else:
                gradients.remove(("B", send.stage - 1, send.microbatch))


def measure(counts: tuple[int, ...]) -> np.ndarray:
    """Where none of these is larger, no bytes are: chunks, and activations and messages together."""
    chunks = len(counts) - 4
    return np.array([*counts[:chunks], sum(counts[: chunks // 2]) + sum(counts[-4:-1])])


@SLOWLY
@given(pipelines(most_ranks=5, most_microbatches=11))
def test_the_largest_instants_are_there_and_exceed_all_others(schedule):
    found = occupancies(schedule)
    lowered = with_communication(schedule)
    largest: dict[tuple, list[tuple[int, ...]]] = {}
    for work, counts in zip(found.work, found.counts.tolist(), strict=True):
        largest.setdefault(work, []).append(tuple(counts))
    everything = [each for rank in range(schedule.num_ranks) for each in held(lowered, rank)]
    for work, counts in everything:
        assert any((measure(most) >= measure(counts)).all() for most in largest[work])
    assert {(work, counts) for work, each in largest.items() for counts in each} <= set(everything)


def test_1f1b_holds_as_many_activations_as_ranks_follow():
    found = occupancies(build("1f1b", 4, 12))
    kept = {rank: max(counts[0] for work, counts in zip(*found, strict=True) if work[0] == rank) for rank in range(4)}
    assert kept == {0: 4, 1: 3, 2: 2, 3: 1}


@pytest.mark.parametrize("microbatches", [24, 26])
@pytest.mark.parametrize("name", RECIPES)
def test_a_schedule_that_repeats_itself_is_known_for_any_number_of_micro_batches(name, microbatches):
    ranks, chunks = 4, RECIPES[name].virtual_stages[0]
    repeated = growth(name, ranks, chunks, microbatches)
    built = occupancies(build(name, ranks, microbatches, chunks))
    alike = not name.startswith("interleaved") or microbatches % ranks == 0  # the rounds
    assert repeated.least < microbatches or not alike
    assert repeated.work == built.work
    assert (repeated.at(microbatches) == built.counts).all()

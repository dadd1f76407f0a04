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


class Holding:
    """What a rank holds, written out as sets of (stage, micro-batch) and of messages."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.schedule, self.rank, self.stages = schedule, rank, schedule.stages_of(rank)
        self.kept: set[tuple[int, int]] = set()
        self.deferred: set[tuple[int, int]] = set()
        self.came: set[tuple[int, int]] = set()
        self.outputs: set[Passing] = set()
        self.gradients: set[Passing] = set()
        self.incoming: set[Passing] = set()

    def begin(self, part: Action) -> None:
        here = (part.stage, part.microbatch)
        if part.kind is Kind.FORWARD:
            self.kept.add(here)
            self.incoming.discard(("F", *here))
            if receive_of(self.schedule, part, self.rank):
                self.came.add(here)
            if part.stage < self.schedule.num_stages - 1:
                self.outputs.add(_result(part))

    def end(self, part: Action) -> None:
        here, sent, after = (part.stage, part.microbatch), send_of(self.schedule, part, self.rank), _result(part)
        if part.kind in BACKWARDS:
            self.kept.remove(here)
            self.came.discard(here)
            self.incoming.discard(("B", *here))
            if part.kind is Kind.INPUT_GRAD:
                self.deferred.add(here)
            if sent:
                self.gradients.add(after)
        if part.kind is Kind.WEIGHT_GRAD:
            self.deferred.discard(here)
        elif not sent and 0 <= after[1] < self.schedule.num_stages:
            self.outputs.discard(after)
            self.incoming.add(after)

    def arrive(self, send: Action) -> None:
        """A message of this rank is known to have arrived."""
        (self.outputs if send.kind is Kind.SEND_FORWARD else self.gradients).remove(_result(send))

    def counts(self, posted: int) -> tuple[int, ...]:
        chunks = [sum(s == stage for s, _ in each) for each in (self.kept, self.deferred) for stage in self.stages]
        return (*chunks, len(self.outputs), len(self.gradients), len(self.incoming) + posted, len(self.came))


def _result(part: Action) -> Passing:
    """What a forward, a backward or a message of either hands on, by where it goes."""
    if part.kind in (Kind.FORWARD, Kind.SEND_FORWARD):
        return "F", part.stage + 1, part.microbatch
    return "B", part.stage - 1, part.microbatch


def held(schedule: Schedule, rank: int) -> Iterator[tuple[tuple, tuple[int, ...]]]:
    """(work, counts) of every action of `rank`."""
    arrived, holding, actions = acknowledgements(schedule, rank), Holding(schedule, rank), schedule.ranks[rank]
    weights = [(action.stage, action.microbatch) for action in actions if action.kind is Kind.WEIGHT_GRAD]
    for i, action in enumerate(actions):
        if action.kind in COMPUTE:
            for part in action.parts:
                holding.begin(part)
            after = next((n for n in range(i + 1, len(actions)) if actions[n].kind in COMPUTE), len(actions))
            posted, last = sum(each.kind in RECEIVES for each in actions[i:after]), action.parts[-1]
            if action.kind is not Kind.WEIGHT_GRAD or (action.stage, action.microbatch) in holding.deferred:
                beside = action.stage if action.pair else -1
                yield (rank, last.kind, last.stage, beside, NO_CONTEXT), holding.counts(posted)
            for part in action.parts:
                holding.end(part)
            if action.pair and holding.deferred:  # as many weight gradients have run as the pair has left behind
                holding.deferred.remove(next(here for here in weights if here in holding.deferred))
        elif action.kind in RECEIVES:
            holding.incoming.add(("F" if action.kind is Kind.RECV_FORWARD else "B", action.stage, action.microbatch))
        for send in arrived.get(action, ()):
            holding.arrive(send)


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

"""The closed forms of what a schedule's ranks hold and do beside no other pass, against the built schedules."""

import pytest

from pipermoe.schedule.action import Action, Kind
from pipermoe.schedule.builders import RECIPES, build, illegal
from pipermoe.schedule.occupancy import OUTPUTS, RECEIVED, occupancies
from pipermoe.schedule.ramps import ramps

CASES = [
    (name, p, chunks, m)
    for name, recipe in RECIPES.items()
    for p in (1, 2, 3, 4, 5, 6, 7, 8)
    for chunks in ([recipe.virtual_stages[0]] if recipe.virtual_stages[1] else [2, 3])
    for m in (2, p + 1, 2 * p, 3 * p + 1)
    if not illegal(name, p, m, chunks)
]


def of_each(stages: tuple[int, ...], passes: list[Action]) -> tuple[int, ...]:
    return tuple(sum(part.stage == stage for part in passes) for stage in stages)


@pytest.mark.parametrize("name", RECIPES)
def test_a_rank_holds_what_is_said(name):
    for _, p, chunks, m in (case for case in CASES if case[0] == name):
        schedule, found = build(name, p, m, chunks), ramps(name, p, chunks, m)
        for rank, ramp in enumerate(found):
            stages = schedule.stages_of(rank)
            held, seen, most = dict.fromkeys(stages, 0), set(), 0
            for action in schedule.ranks[rank]:
                if action.pair:
                    seen.add(tuple(held.values()))
                for part in action.parts:
                    if part.kind is not Kind.WEIGHT_GRAD:
                        held[part.stage] += 1 if part.kind is Kind.FORWARD else -1
                        most = max(most, held[stages[0]])
                if not action.pair:
                    seen.add(tuple(held.values()))
            for kept in ramp.kept:
                at_least = [all(a >= b for a, b in zip(each, kept, strict=True)) for each in seen]
                assert any(at_least), (name, p, chunks, m, rank, kept)
            assert not ramp.most or most <= ramp.most, (name, p, chunks, m, rank, most)


@pytest.mark.parametrize("name", [name for name in RECIPES if "overlap" in name or name.startswith("dualpipe")])
def test_passes_that_are_said_to_be_alone_are_in_no_pair(name):
    for _, p, chunks, m in (case for case in CASES if case[0] == name):
        schedule, found = build(name, p, m, chunks), ramps(name, p, chunks, m)
        for rank, ramp in enumerate(found):
            stages = schedule.stages_of(rank)
            single = [action for action in schedule.ranks[rank] if not action.pair]
            forward = of_each(stages, [part for part in single if part.kind is Kind.FORWARD])
            backward = of_each(stages, [p for p in single if p.kind in (Kind.BACKWARD, Kind.INPUT_GRAD)])
            everything = of_each(stages, [part for part in schedule.parts(rank) if part.kind is Kind.FORWARD])
            for alone, said in ((forward, ramp.alone_forward), (backward, ramp.alone_backward)):
                least = map(min, said, everything)
                assert all(a >= b for a, b in zip(alone, least, strict=True)), (p, chunks, m, rank)
            never = zip(forward, everything, ramp.never_paired or [0] * len(stages), strict=True)
            assert all(alone == n for alone, n, at_all in never if at_all), (p, chunks, m, rank)


@pytest.mark.parametrize("name", RECIPES)
def test_so_many_weight_gradients_wait_while_a_backward_runs(name):
    for _, p, chunks, m in (case for case in CASES if case[0] == name):
        ranks = ramps(name, p, chunks, m)
        if not any(ramp.waiting for ramp in ranks):
            continue
        found = occupancies(build(name, p, m, chunks))
        for rank, ramp in enumerate(ranks):
            for kept, waiting in ramp.waiting:
                least = [*kept, *waiting]
                assert any(
                    (counts[: len(least)] >= least).all()
                    for (where, kind, *_), counts in zip(found.work, found.counts, strict=True)
                    if where == rank and kind in (Kind.BACKWARD, Kind.INPUT_GRAD)
                ), (p, chunks, m, rank, least)


@pytest.mark.parametrize("name", [name for name in RECIPES if any(ramp.paired for ramp in ramps(name, 4, 2, 16))])
def test_so_much_is_held_while_a_pair_runs(name):
    for _, p, chunks, m in (case for case in CASES if case[0] == name):
        schedule, ranks = build(name, p, m, chunks), ramps(name, p, chunks, m)
        found = occupancies(schedule)
        for rank, ramp in enumerate(ranks):
            for chunk, held, messages in ramp.paired:
                stage = schedule.stages_of(rank)[chunk]
                assert any(
                    work.rank == rank
                    and work.stage == work.beside == stage
                    and (counts[: len(held)] >= held).all()
                    and counts[OUTPUTS:RECEIVED].sum() >= messages
                    for work, counts in zip(found.work, found.counts, strict=True)
                ), (p, chunks, m, rank, held, messages)


@pytest.mark.parametrize("name", ["v-half", "v-half-overlap", "v-min"])
def test_so_many_come_back_at_once_but_for_the_last(name):
    for p in range(1, 13):
        for m in (2, p // 2 + 1, p, 2 * p + 1):
            schedule, found = build(name, p, m, 2), ramps(name, p, 2, m)
            for rank, ramp in enumerate(found):
                turn = {}
                for place, action in enumerate(schedule.ranks[rank]):
                    turn |= {
                        (part.stage, part.microbatch): place for part in action.parts if part.kind is Kind.INPUT_GRAD
                    }
                low, high = schedule.stages_of(rank)
                for first in range(m - max(ramp.last, ramp.returning)):
                    assert turn[low, first] < turn[high, first + ramp.returning], (p, m, rank, first)

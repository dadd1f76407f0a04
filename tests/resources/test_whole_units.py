"""Which units are whole: what the context of an action says, beside the whole program of a rank followed from its
first action on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipermoe.resources.sharded_units import ALL, EXPERTS, NONE
from pipermoe.resources.turns import Part, in_turn, parts_of_stages, steps, turns
from pipermoe.resources.whole_units import (
    Sharded,
    UnitKind,
    WholeGradients,
    WholeUnits,
    WholeWeights,
    kinds_of_units,
    units_of_stages,
)
from pipermoe.schedule.action import Action, Kind
from pipermoe.schedule.builders import RECIPES, build
from pipermoe.schedule.occupancy import occupancies

Seen = tuple[int, Kind, int, int, tuple[tuple[int, ...], ...]]  # rank, kind, stage, beside, counts step by step

# A third unit that a pair has left stays until one is gathered that is not there: longer than a context remembers.
LINGERING = ("interleaved-1f1b-overlap", 1, Sharded(ALL, ALL))


def followed(parts_of, sharded: Sharded, actions: tuple[Action, ...], rank: int) -> Iterator[Seen]:
    """All actions of a rank, with a queue of the steps whose weight gradients are still to run."""
    units_of, kinds = units_of_stages(parts_of), kinds_of_units(parts_of)
    names = [{unit for unit, kind in kinds.items() if kind in each} for each in sharded]
    weights, gradients = WholeWeights(names[0]), WholeGradients(names[1])
    queues = {(a.stage, a.microbatch): [] for each in actions for a in each.parts if a.kind is Kind.WEIGHT_GRAD}

    def counts() -> tuple[int, ...]:
        here = [[kinds[unit] for unit in each.here] for each in (weights, gradients)]
        return tuple(each.count(kind) for each in here for kind in UnitKind)

    def run(stage: int, step) -> None:
        gradients.begin(units_of[stage], step)
        gradients.end(parts_of[stage], units_of[stage], step)

    for action in actions:
        part, seen = action.parts[-1], []
        stage, queue = part.stage, queues.setdefault((part.stage, part.microbatch), [])
        if part.kind is Kind.WEIGHT_GRAD and not queue:
            continue
        if action.pair:
            owed = 0
            for step in in_turn(turns(parts_of[action.stage], forward=True), turns(parts_of[stage], forward=False)):
                if step is None:
                    for _ in range(owed):
                        (at, _), first = next(item for item in queues.items() if item[1])
                        run(at, first.pop(0))
                    owed = 0
                    continue
                weights.begin(units_of[action.stage if step.forward else stage], step)
                if not step.forward:
                    owed += 1
                    queue.append(step)
                seen.append(counts())
        elif part.kind is Kind.WEIGHT_GRAD:
            for step in steps(parts_of[stage], forward=False):
                gradients.begin(units_of[stage], step)
                seen.append(counts())
                gradients.end(parts_of[stage], units_of[stage], step)
            queue.clear()
        else:
            for step in steps(parts_of[stage], forward=part.kind is Kind.FORWARD):
                weights.begin(units_of[stage], step)
                if part.kind is Kind.BACKWARD:
                    gradients.begin(units_of[stage], step)
                seen.append(counts())
                if part.kind is Kind.BACKWARD:
                    gradients.end(parts_of[stage], units_of[stage], step)
            if part.kind is Kind.INPUT_GRAD:
                queue += [step for turn in turns(parts_of[stage], forward=False) for step in turn.steps]
        yield rank, part.kind, stage, action.stage if action.pair else -1, tuple(seen)


def in_context(parts_of, sharded: Sharded, schedule) -> Iterator[Seen]:
    """Every action from its context alone."""
    found = WholeUnits(parts_of, sharded)
    for work in occupancies(schedule, in_context=True).work:
        whole, seen, stage = found.before(work.context), [], work.stage
        if work.beside >= 0:
            for step in in_turn(turns(parts_of[work.beside], forward=True), turns(parts_of[stage], forward=False)):
                if step is None:
                    whole.add_owed()
                else:
                    whole.use(work.beside if step.forward else stage, step)
                    seen.append(tuple(whole.counts))
        else:
            for step in steps(parts_of[stage], forward=work.kind is Kind.FORWARD):
                if work.kind is not Kind.WEIGHT_GRAD:
                    whole.use(stage, step)
                if work.kind in (Kind.BACKWARD, Kind.WEIGHT_GRAD):
                    whole.fill(stage, step)
                seen.append(tuple(whole.counts))
                if work.kind in (Kind.BACKWARD, Kind.WEIGHT_GRAD):
                    whole.reduce(stage, step)
        yield work.rank, work.kind, stage, work.beside, tuple(seen)


@pytest.mark.parametrize("sharded", [Sharded(ALL, ALL), Sharded(EXPERTS, ALL)], ids=["all", "experts"])
@pytest.mark.parametrize("layers_per_stage", [1, 2])
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "dualpipe"])
def test_what_is_whole_follows_from_the_actions_just_before(name, layers_per_stage, sharded):
    ranks, chunks = 3, RECIPES[name].virtual_stages[0]
    stages = ranks * chunks
    schedule = build(name, ranks, 9, chunks)
    parts_of = parts_of_stages([layer > 0 for layer in range(stages * layers_per_stage)], stages, (), 0)
    exact = {seen for rank in range(ranks) for seen in followed(parts_of, sharded, schedule.ranks[rank], rank)}
    found = set(in_context(parts_of, sharded, schedule))
    if (name, layers_per_stage, sharded) == LINGERING:
        assert all(any(one_unit_more(seen, other) for other in found) for seen in exact)
    else:
        assert found == exact


def one_unit_more(seen: Seen, other: Seen) -> bool:
    """The same action, with at most one unit more at any step."""
    return seen[:-1] == other[:-1] and all(sum(a) - sum(b) <= 1 for a, b in zip(seen[-1], other[-1], strict=True))


def test_a_forward_has_the_layer_in_work_and_the_next_one_and_ends_with_its_last_two():
    parts = (Part.EMBEDDING, Part.DENSE, Part.MOE, Part.MOE)
    whole = WholeUnits([parts], Sharded(ALL, NONE))
    seen = []
    for step in steps(parts, forward=True):
        whole.use(0, step)
        seen.append({kind.name: n for kind, n in zip(UnitKind, whole.counts, strict=False) if n})
    assert seen == [{"EMBEDDING": 1, "DENSE": 1}, {"DENSE": 1, "MOE": 1}, {"MOE": 2}, {"MOE": 2}]


def test_gradients_of_two_units_are_whole_while_a_backward_goes_on_and_of_one_after_it():
    parts = (Part.MOE, Part.HEAD)
    whole = WholeUnits([parts], Sharded(NONE, ALL))
    seen = []
    for step in steps(parts, forward=False):
        whole.fill(0, step)
        seen.append(sum(whole.counts))
        whole.reduce(0, step)
    assert [*seen, sum(whole.counts)] == [1, 2, 1]

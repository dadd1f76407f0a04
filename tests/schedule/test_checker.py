"""The checker accepts every named schedule and objects to every way of breaking one."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.schedule.grids import SLOWLY, pipelines

from pipermoe.schedule.action import WHOLE_STAGE, Action, Kind, Schedule, overlap
from pipermoe.schedule.builders import build
from pipermoe.schedule.checker import check, check_exchange_order
from pipermoe.schedule.communication import with_communication
from pipermoe.schedule.sharding import with_gathered_weights, with_reduction

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD  # noqa: E741


def edited(schedule: Schedule, rank: int, actions) -> Schedule:
    ranks = list(schedule.ranks)
    ranks[rank] = tuple(actions)
    return replace(schedule, ranks=tuple(ranks))


@SLOWLY
@given(pipelines())
def test_every_named_schedule_is_sound(schedule):
    assert check(schedule) == []


@SLOWLY
@given(pipelines())
def test_every_named_schedule_is_sound_with_sends_and_sharding(schedule):
    assert check(with_communication(with_gathered_weights(with_reduction(schedule)))) == []


@SLOWLY
@given(pipelines(), st.randoms(use_true_random=False))
def test_a_dropped_action_is_noticed(schedule, random):
    schedule = with_communication(schedule)
    rank = random.randrange(schedule.num_ranks)
    actions = list(schedule.ranks[rank])
    dropped = actions.pop(random.randrange(len(actions)))
    found = check(edited(schedule, rank, actions))
    assert {part for violation in found for part in violation.actions} & set(dropped.parts)


@SLOWLY
@given(pipelines(), st.randoms(use_true_random=False))
def test_a_repeated_action_is_noticed(schedule, random):
    rank = random.randrange(schedule.num_ranks)
    actions = list(schedule.ranks[rank])
    twice = random.choice(actions)
    actions.insert(random.randrange(len(actions) + 1), twice)
    assert any("occurs 2 times" in str(violation) for violation in check(edited(schedule, rank, actions)))


@SLOWLY
@given(pipelines(), st.randoms(use_true_random=False))
def test_work_before_its_data_is_noticed(schedule, random):
    """A backward moved before its own forward."""
    rank = random.randrange(schedule.num_ranks)
    actions = list(schedule.ranks[rank])
    late = random.choice([action for action in actions if action.kind in (B, I)])
    actions.remove(late)
    forward = Action(F, late.stage, late.microbatch)
    actions.insert(next(i for i, action in enumerate(actions) if forward in action.parts), late)
    assert check(edited(schedule, rank, actions))


@SLOWLY
@given(pipelines(), st.randoms(use_true_random=False))
def test_swapped_receives_from_one_peer_are_noticed(schedule, random):
    schedule = with_communication(schedule)
    kinds = (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)
    for rank, actions in enumerate(schedule.ranks):
        by_peer: dict[int, list[int]] = {}
        for i, action in enumerate(actions):
            if action.kind in kinds:
                source = action.stage + (-1 if action.kind is Kind.RECV_FORWARD else 1)
                by_peer.setdefault(schedule.rank_of(source, action.microbatch), []).append(i)
        for positions in by_peer.values():
            if len(positions) > 1:
                first, second = sorted(random.sample(positions, 2))
                swapped = list(actions)
                swapped[first], swapped[second] = swapped[second], swapped[first]
                assert check(edited(schedule, rank, swapped))


@SLOWLY
@given(pipelines(most_ranks=4, most_microbatches=8), st.randoms(use_true_random=False))
def test_what_the_checker_accepts_after_a_swap_also_runs(schedule, random):
    """Swap two actions at random: either a violation, or the lowering (which runs it) succeeds."""
    rank = random.randrange(schedule.num_ranks)
    actions = list(schedule.ranks[rank])
    i, j = random.randrange(len(actions)), random.randrange(len(actions))
    actions[i], actions[j] = actions[j], actions[i]
    swapped = edited(schedule, rank, actions)
    if check(swapped) == []:
        assert check(with_communication(swapped)) == []
    else:
        assert i != j


def test_a_circle_of_waiting_ranks_is_a_deadlock():
    schedule = Schedule.of(
        "crossed",
        2,
        (0, 1),
        [
            [Action(F, 0, 0), Action(B, 0, 0), Action(F, 0, 1), Action(B, 0, 1)],
            [Action(F, 1, 1), Action(B, 1, 1), Action(F, 1, 0), Action(B, 1, 0)],
        ],
    )
    assert list(map(str, check(schedule))) == ["deadlock: ranks 0, 1 wait for each other at: 0B0, 1F1"]


def test_two_ranks_that_both_send_first_deadlock():
    lowered = with_communication(build("1f1b", 2, 3))
    ranks = [[*actions] for actions in lowered.ranks]
    send, receive = Action(Kind.SEND_BACKWARD, 1, 0), Action(Kind.RECV_FORWARD, 1, 1)
    ranks[1].remove(receive)
    ranks[1].insert(ranks[1].index(send) + 1, receive)
    send, receive = Action(Kind.SEND_FORWARD, 0, 1), Action(Kind.RECV_BACKWARD, 0, 0)
    ranks[0].remove(send)
    ranks[0].insert(ranks[0].index(receive), send)
    found = check(replace(lowered, ranks=tuple(map(tuple, ranks))))
    assert [violation.rule for violation in found] == ["deadlock: ranks 0, 1 wait for each other at"]


def test_an_action_on_the_wrong_rank_is_named():
    schedule = build("gpipe", 2, 1)
    moved = replace(schedule, ranks=(schedule.ranks[0][:1], (*schedule.ranks[1], schedule.ranks[0][1])))
    assert "rank 1: is not on the rank that holds its stage: 0B0" in map(str, check(moved))


def test_a_backward_is_either_whole_or_split():
    schedule = build("gpipe", 1, 1)
    both = edited(schedule, 0, [*schedule.ranks[0], Action(W, 0, 0)])
    assert list(map(str, check(both))) == ["rank 0: both whole and split: 0B0, 0W0"]
    half = edited(schedule, 0, [Action(F, 0, 0), Action(I, 0, 0)])
    assert list(map(str, check(half))) == ["rank 0: is missing: 0W0"]


def test_a_pair_of_one_microbatch_cannot_overlap():
    pair = edited(build("gpipe", 1, 1), 0, [overlap(Action(F, 0, 0), Action(B, 0, 0))])
    assert [violation.rule for violation in check(pair)] == [
        "is not a forward beside the backward of another micro-batch"
    ]


@pytest.mark.parametrize(
    ("kind", "at", "rule"),
    [
        (Kind.UNSHARD, 1, "gathers weights that are gathered"),
        (Kind.RESHARD, 0, "drops weights that are not gathered"),
        (Kind.RESHARD, 1, "uses weights that are not gathered"),
        (Kind.REDUCE, 2, "comes after its gradients were reduced"),
    ],
)
def test_misplaced_sharding_actions_are_noticed(kind, at, rule):
    schedule = with_gathered_weights(build("gpipe", 1, 1))
    actions = list(schedule.ranks[0])
    actions.insert(at, Action(kind, 0, WHOLE_STAGE))
    assert rule in [violation.rule for violation in check(edited(schedule, 0, actions))]


def test_all_ranks_of_an_expert_group_need_the_same_order_of_all_to_alls():
    ours = build("zb-h1", 2, 4).ranks[1]
    assert check_exchange_order([ours, ours, ours]) == []
    weights_first = sorted(ours, key=lambda action: action.kind is not W)  # W has no all-to-all: any place will do
    assert check_exchange_order([ours, weights_first]) == []
    swapped = [*ours[:2], ours[3], ours[2], *ours[4:]] if ours[3].kind is not W else [ours[1], ours[0], *ours[2:]]
    assert [str(v) for v in check_exchange_order([ours, swapped])] == [
        f"rank 1: issues its all-to-alls in another order than rank 0: {swapped[2]}, {ours[2]}"
    ]
    assert check_exchange_order([ours, ours[:-4]])[0].rule == "issues another number of all-to-alls than rank 0"


def test_random_orders_are_mostly_unsound():
    """The checker is no rubber stamp: shuffled ranks hardly ever pass."""
    schedule = build("1f1b", 3, 4)
    shuffle = random.Random(0)
    passed = 0
    for _ in range(50):
        ranks = tuple(tuple(shuffle.sample(actions, len(actions))) for actions in schedule.ranks)
        passed += check(replace(schedule, ranks=ranks)) == []
    assert passed == 0

"""Proof, before anything runs, that a schedule is complete, consistent and cannot hang."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipermoe.schedule.action import COMPUTE, RECEIVES, SENDS, SHARDING, WHOLE_STAGE, Action, Kind, Schedule, source_of
from pipermoe.schedule.communication import matching_receive, receive_of, send_of
from pipermoe.schedule.memory import InFlight, in_flight

__all__ = ["InFlight", "Violation", "check", "check_exchange_order", "in_flight"]

_BACKWARDS = (Kind.BACKWARD, Kind.INPUT_GRAD)


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule and the actions involved; `rank` is -1 when it concerns no single rank."""

    rule: str
    rank: int
    actions: tuple[Action, ...]

    def __str__(self) -> str:
        where = f"rank {self.rank}: " if self.rank >= 0 else ""
        return f"{where}{self.rule}: {', '.join(map(str, self.actions))}"


def check(schedule: Schedule) -> list[Violation]:
    """Everything that is wrong with a schedule; empty when it may run.

    Placement, each action once, pairs independent, order on the rank, all activations freed, weights gathered when they
    are used, gradients reduced once they are complete, and that the whole runs to its end. A schedule with sends and
    receives is also checked for them: one of each where data changes rank, in equal order on both sides, and no
    deadlock even if every send blocks until its receive.
    """
    misplaced = [*_misplaced(schedule), *_wrong_counts(schedule)]
    if misplaced:  # the other rules assume that every action exists once, where it belongs
        return misplaced
    lowered = any(action.kind in SENDS | RECEIVES for actions in schedule.ranks for action in actions)
    found = [*_dependent_pairs(schedule), *_wrong_order(schedule), *_sharding_broken(schedule)]
    if lowered:
        found += [*_communication_out_of_place(schedule), *_order_differs_between_peers(schedule)]
    return found or [*_never_runs(schedule, lowered)]


def _misplaced(schedule: Schedule) -> Iterator[Violation]:
    """Actions on a rank that does not hold their stage, or outside the pipeline."""
    for rank in range(schedule.num_ranks):
        held = schedule.stages_of(rank)
        for part in schedule.parts(rank):
            if part.microbatch == WHOLE_STAGE:
                right = part.stage in held
            else:
                inside = 0 <= part.stage < schedule.num_stages and 0 <= part.microbatch < schedule.microbatches
                right = inside and schedule.rank_of(part.stage, part.microbatch) == rank
            if not right:
                yield Violation("is not on the rank that holds its stage", rank, (part,))


def _wrong_counts(schedule: Schedule) -> Iterator[Violation]:
    """Actions that are missing or repeated: per stage and micro-batch one F, and either one B or one I and one W."""
    times = Counter(part for rank in range(schedule.num_ranks) for part in schedule.parts(rank))
    for part, count in times.items():
        if count > 1 and part.kind not in SHARDING:
            yield Violation(f"occurs {count} times", schedule.rank_of(part.stage, part.microbatch), (part,))
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.microbatches):
            forward, full, first, second = (
                Action(kind, stage, microbatch)
                for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD)
            )
            rank = schedule.rank_of(stage, microbatch)
            if not times[forward]:
                yield Violation("is missing", rank, (forward,))
            if times[full] and (times[first] or times[second]):
                yield Violation("both whole and split", rank, (full, first if times[first] else second))
            elif not times[full]:
                missing = tuple(a for a in (first, second) if not times[a])
                if missing:
                    yield Violation("is missing", rank, missing if len(missing) == 1 else (full,))


def _dependent_pairs(schedule: Schedule) -> Iterator[Violation]:
    """Overlapped pairs that are not a forward and a backward of different micro-batches."""
    for rank, actions in enumerate(schedule.ranks):
        for action in actions:
            if action.kind is Kind.OVERLAP:
                kinds = [part.kind for part in action.parts]
                good = len(kinds) == 2 and kinds[0] is Kind.FORWARD and kinds[1] in _BACKWARDS
                if not good or action.parts[0].microbatch == action.parts[1].microbatch:
                    rule = "is not a forward beside the backward of another micro-batch"
                    yield Violation(rule, rank, (action,))


def _wrong_order(schedule: Schedule) -> Iterator[Violation]:
    """Work on a micro-batch that comes before what it needs from the same rank: F, then B or I, then W."""
    for rank in range(schedule.num_ranks):
        position = {part: i for i, part in enumerate(schedule.parts(rank))}
        for part, i in position.items():
            for need in _needs_on_rank(schedule, part, rank):
                if position.get(need, i) > i:
                    yield Violation("comes before what it needs", rank, (part, need))


def _needs_on_rank(schedule: Schedule, part: Action, rank: int) -> Iterator[Action]:
    """Actions of the same rank whose results `part` uses."""
    if part.kind in _BACKWARDS:
        yield Action(Kind.FORWARD, part.stage, part.microbatch)
    if part.kind is Kind.WEIGHT_GRAD:
        yield Action(Kind.INPUT_GRAD, part.stage, part.microbatch)
    source = source_of(schedule, part)
    if source and source[1] == rank:
        kinds = (Kind.FORWARD,) if part.kind is Kind.FORWARD else _BACKWARDS
        yield from (Action(kind, source[0], part.microbatch) for kind in kinds)


def _sharding_broken(schedule: Schedule) -> Iterator[Violation]:
    """Weights used while sharded, gathered or dropped twice; gradients not reduced once, after the last B or W.

    Only for stages of which the rank has such actions at all: weights may also stay gathered and be reduced elsewhere.
    """
    for rank in range(schedule.num_ranks):
        parts = list(schedule.parts(rank))
        sharded = {part.stage for part in parts if part.kind is Kind.UNSHARD}
        reduced: dict[int, Action] = {}
        gathered: set[int] = set()
        for part in parts:
            if part.kind is Kind.UNSHARD:
                if part.stage in gathered:
                    yield Violation("gathers weights that are gathered", rank, (part,))
                gathered.add(part.stage)
            elif part.kind is Kind.RESHARD:
                if part.stage not in gathered:
                    yield Violation("drops weights that are not gathered", rank, (part,))
                gathered.discard(part.stage)
            elif part.kind is Kind.REDUCE:
                if part.stage in reduced:
                    yield Violation("occurs 2 times", rank, (part,))
                reduced[part.stage] = part
            elif part.kind in COMPUTE:
                if part.stage in sharded - gathered:
                    yield Violation("uses weights that are not gathered", rank, (part,))
                if part.stage in reduced and part.kind in (Kind.BACKWARD, Kind.WEIGHT_GRAD):
                    yield Violation("comes after its gradients were reduced", rank, (part, reduced[part.stage]))


def _communication_out_of_place(schedule: Schedule) -> Iterator[Violation]:
    """A send that is missing or before its action, a receive that is missing or after its use, or one nobody needs."""
    for rank in range(schedule.num_ranks):
        position = {part: i for i, part in enumerate(schedule.parts(rank))}
        expected = set()
        for part, i in position.items():
            if part.kind not in COMPUTE:
                continue
            for found, before in ((receive_of(schedule, part, rank), True), (send_of(schedule, part, rank), False)):
                if found is None:
                    continue
                expected.add(found[0])
                if found[0] not in position:
                    yield Violation("is missing", rank, (found[0],))
                elif (position[found[0]] < i) is not before:
                    yield Violation(
                        "comes after its use" if before else "comes before its data", rank, (found[0], part)
                    )
        for part in position:
            if part.kind in SENDS | RECEIVES and part not in expected:
                yield Violation("moves data that nobody needs", rank, (part,))


def _order_differs_between_peers(schedule: Schedule) -> Iterator[Violation]:
    """Receives that do not come in the order of the sends, for each pair of ranks and direction."""
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank in range(schedule.num_ranks):
        for part in schedule.parts(rank):
            if part.kind in SENDS:
                receive = matching_receive(part)
                sent[rank, schedule.rank_of(receive.stage, part.microbatch)].append(receive)
            elif part.kind in RECEIVES:
                source = part.stage + (-1 if part.kind is Kind.RECV_FORWARD else 1)
                received[schedule.rank_of(source, part.microbatch), rank].append(part)
    for pair in sorted(sent.keys() | received.keys()):
        for theirs, ours in zip(sent[pair], received[pair], strict=False):
            if theirs != ours:
                yield Violation(
                    f"is received out of order, rank {pair[0]} sends another first", pair[1], (ours, theirs)
                )
                break


def _never_runs(schedule: Schedule, lowered: bool) -> Iterator[Violation]:
    """The actions on which every rank that is not done waits forever; with rendezvous sends if there are any."""
    done: set[Action] = set()
    at = [0] * schedule.num_ranks
    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule.ranks):
            while at[rank] < len(actions) and _can_run(schedule, actions[at[rank]], rank, at, done, lowered):
                done.update(actions[at[rank]].parts)
                at[rank] += 1
                progress = True
    waiting = [(rank, actions[at[rank]]) for rank, actions in enumerate(schedule.ranks) if at[rank] < len(actions)]
    if waiting:
        ranks = ", ".join(str(rank) for rank, _ in waiting)
        rule = f"deadlock: ranks {ranks} wait for each other at"
        yield Violation(rule, -1, tuple(action for _, action in waiting))


def _can_run(schedule: Schedule, action: Action, rank: int, at: list[int], done: set[Action], lowered: bool) -> bool:
    """Whether the next action of a rank has its data; a send also needs its receiver to have arrived at the receive."""
    if action.kind in SENDS:
        receive = matching_receive(action)
        peer = schedule.rank_of(receive.stage, action.microbatch)
        return at[peer] < len(schedule.ranks[peer]) and schedule.ranks[peer][at[peer]] == receive
    if action.kind in RECEIVES:
        source = action.stage + (-1 if action.kind is Kind.RECV_FORWARD else 1)
        kind = Kind.SEND_FORWARD if action.kind is Kind.RECV_FORWARD else Kind.SEND_BACKWARD
        return Action(kind, source, action.microbatch) in done
    for part in action.parts:
        source = source_of(schedule, part)
        if source is None or (lowered and source[1] != rank):
            continue
        kinds = (Kind.FORWARD,) if part.kind is Kind.FORWARD else _BACKWARDS
        if not any(Action(kind, source[0], part.microbatch) in done for kind in kinds):
            return False
    return True


def check_exchange_order(members: Sequence[Sequence[Action]]) -> list[Violation]:
    """Whether the ranks of one expert group issue their all-to-alls in the same order, else they would hang.

    `members[i]` are the actions that the i-th rank of the group is about to run. Every F, B and I issues all-to-alls; a
    pair interleaves those of its parts, so pairing itself is part of the order. W issues none.
    """
    orders = [[action for action in actions if action.kind in COMPUTE - {Kind.WEIGHT_GRAD}] for actions in members]
    found = []
    for rank, order in enumerate(orders[1:], start=1):
        for ours, theirs in zip(order, orders[0], strict=False):
            if ours != theirs:
                found.append(Violation("issues its all-to-alls in another order than rank 0", rank, (ours, theirs)))
                break
        else:
            if len(order) != len(orders[0]):
                longer = max(order, orders[0], key=len)
                extra = longer[min(len(order), len(orders[0])) :]
                found.append(Violation("issues another number of all-to-alls than rank 0", rank, tuple(extra[:1])))
    return found

"""What a pipeline rank holds while each of its actions runs: counts of micro-batches and of messages.

The order of a schedule alone decides it. Sizes in bytes are the business of `resources`; here a count says how many
times each of them is held.
"""

from __future__ import annotations

from functools import lru_cache
from heapq import heappop, heappush
from itertools import repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipermoe.schedule.action import COMPUTE, RECEIVES, Kind, Schedule
from pipermoe.schedule.arrivals import proofs
from pipermoe.schedule.builders import build
from pipermoe.schedule.columns import KINDS, Columns, Ints
from pipermoe.schedule.communication import with_communication
from pipermoe.schedule.context import NO_CONTEXT, Context, Decoder, contexts
from pipermoe.schedule.ramps import ramps

# P elementary actions, C chunks per rank, N instants: actions with all that is held while they run

REPEATS = 2  # micro-batches per pipeline rank after which a schedule repeats itself
OUTPUTS, GRADIENTS, INCOMING, RECEIVED = range(-4, 0)  # the last columns of counts


class Work(NamedTuple):
    """Kind is F, B, I or W. A backward of a pair runs `beside` the forward of that stage, layer by layer in turn;
    alone, that is -1.
    """

    rank: int
    kind: Kind
    stage: int
    beside: int
    context: Context = NO_CONTEXT


class Occupancies(NamedTuple):
    """What ranks hold while they work: `work` of every row of `counts`, (N, 2 C + 4).

    The counts of chunks are in the order of `stages_of(rank)`: first the micro-batches that have the activations
    of a forward, the current one included; then those that have only what their weight gradients still need. Then
    message-sized buffers: forward results sent and not known to have arrived, or waiting for the next stage on this
    rank; the same of input gradients; inputs and gradients received and not used yet, or made by another stage of this
    rank; inputs that came from another rank and belong to activations since. The result of the action is among them
    already, its operands still are.
    """

    work: tuple[Work, ...]
    counts: Ints


def occupancies(schedule: Schedule, *, in_context: bool = False) -> Occupancies:
    """The occupancies of all ranks that can be the most: none is below another in every count at the same work.

    Work is the same `in_context` only if what came before it on the rank is.
    """
    lowered = with_communication(schedule)
    columns = Columns.of(lowered)
    weights = np.flatnonzero(columns.of_kind(Kind.WEIGHT_GRAD))
    runs = _weights_run(columns, weights)
    uses = _uses(columns)
    pair = columns.position[uses] == np.append(-1, columns.position)[uses]
    pair &= columns.rank[uses] == np.append(-1, columns.rank)[uses]
    # Weight gradients that have run beside a pair leave nothing to their W.
    instants = np.sort(np.concatenate([uses, weights[runs == weights]]))
    first = instants - np.isin(instants, uses[pair])
    beside = np.where(first < instants, columns.stage[first], -1)
    work = np.stack([columns.rank[instants], _ALPHABETICAL[columns.kind[instants]], columns.stage[instants], beside])
    if in_context:
        work = np.concatenate([work, contexts(columns, uses, uses - pair, weights, runs, instants)])
    counts = _counts(lowered, columns, runs, instants, first)
    rows = _largest(work, counts)
    rank, kind, stage, beside, *codes = work[:, rows].tolist()
    found = map(Decoder(columns), *codes) if codes else repeat(NO_CONTEXT, len(rank))
    kinds = map(_BY_NAME.__getitem__, kind)
    return Occupancies(tuple(map(Work, rank, kinds, stage, beside, found)), counts[rows])


_BY_NAME = sorted(KINDS)
_ALPHABETICAL = np.array([_BY_NAME.index(kind) for kind in KINDS])


def _uses(columns: Columns) -> Ints:
    """The actions that use weights, as places in the columns; of a pair the backward."""
    works = columns.of_kind(Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD)
    goes_on = (np.diff(columns.position, append=-1) == 0) & (np.diff(columns.rank, append=-1) == 0)
    return np.flatnonzero(works & ~goes_on)


def _counts(schedule: Schedule, columns: Columns, runs: Ints, last: Ints, first: Ints) -> Ints:
    """What is held while the actions with the parts `first` to `last` run, (N, 2 C + 4).

    Parts of a pair run in turn: both begin before either ends. The buffers of receives up to the next computation wait
    beside this one.
    """
    begins, ends = _changes(schedule, columns, runs)
    begun = np.cumsum(begins, axis=0)
    ended = np.cumsum(ends, axis=0) - ends
    received = np.cumsum(columns.of_kind(*RECEIVES))
    ranks = np.arange(schedule.num_ranks)
    start, stop = (np.searchsorted(columns.rank, ranks, side=side)[columns.rank[last]] for side in ("left", "right"))
    computes = np.append(np.flatnonzero(columns.of_kind(*COMPUTE)), len(columns.rank))
    until = np.minimum(computes[np.searchsorted(computes, last, side="right")], stop)
    counts = begun[last] - begun[start] + begins[start] + ended[first] - ended[start]
    counts[:, INCOMING] += np.append(0, received)[until] - np.append(0, received)[start]
    return counts


def _changes(schedule: Schedule, columns: Columns, runs: Ints) -> tuple[Ints, Ints]:
    """What the beginning and the end of every elementary action change, (P, 2 C + 4) each; W actions `runs` there."""
    stages_of = [schedule.stages_of(rank) for rank in range(schedule.num_ranks)]
    chunk = np.zeros((schedule.num_ranks, schedule.num_stages), dtype=np.int64)
    for rank, stages in enumerate(stages_of):
        chunk[rank, list(stages)] = range(len(stages))
    chunks = max(map(len, stages_of))
    kept = chunk[columns.rank, columns.stage]
    begins = np.zeros((len(columns.rank), 2 * chunks + 4), dtype=np.int64)
    ends = np.zeros_like(begins)
    takes, hands_on = columns.source >= 0, columns.target >= 0
    far, near = columns.target != columns.rank, columns.target == columns.rank

    forward = np.flatnonzero(columns.of_kind(Kind.FORWARD))
    begins[forward, kept[forward]] = 1
    begins[forward, OUTPUTS] = hands_on[forward]
    begins[forward, INCOMING] = -1 * takes[forward]  # the input is one of the activations from now on
    begins[forward, RECEIVED] = (takes & (columns.source != columns.rank))[forward]
    ends[forward, OUTPUTS] = -1 * near[forward]
    ends[forward, INCOMING] = near[forward]

    backward = np.flatnonzero(columns.of_kind(Kind.BACKWARD, Kind.INPUT_GRAD))
    ends[backward, kept[backward]] = -1
    ends[backward, GRADIENTS] = (hands_on & far)[backward]
    ends[backward, INCOMING] = near[backward].astype(int) - takes[backward]
    ends[backward, RECEIVED] = -1 * (hands_on & far)[backward]  # the gradient goes where the input came from

    split, weights = (np.flatnonzero(columns.of_kind(kind)) for kind in (Kind.INPUT_GRAD, Kind.WEIGHT_GRAD))
    ends[split, chunks + kept[split]] = 1
    np.subtract.at(ends, (runs, chunks + kept[weights]), 1)
    proof = proofs(schedule, columns)
    for kind, buffer in ((Kind.SEND_FORWARD, OUTPUTS), (Kind.SEND_BACKWARD, GRADIENTS)):
        proven = proof[columns.of_kind(kind)]
        np.subtract.at(ends[:, buffer], proven[proven >= 0], 1)
    return begins, ends


def _weights_run(columns: Columns, weights: Ints) -> Ints:
    """Where each of these W actions has run, by its place among all actions: there, or before, in a pair.

    Beside the forward of a pair as many weight gradients run as its backward leaves behind, the first in order first.
    """
    runs = np.arange(len(columns.rank))
    behind = (np.diff(columns.position, prepend=-1) == 0) & (np.diff(columns.rank, prepend=-1) == 0)
    if not behind.any():
        return runs[weights]
    keys = np.stack([columns.rank, columns.stage, columns.microbatch], axis=1)
    action = dict(zip(map(tuple, keys[weights].tolist()), weights.tolist(), strict=True))
    split, paired = columns.of_kind(Kind.INPUT_GRAD), behind.tolist()
    waiting: list[int] = []  # W actions whose I has run, a heap
    for i in np.flatnonzero(split | behind | columns.of_kind(Kind.WEIGHT_GRAD)).tolist():
        if split[i]:
            heappush(waiting, action[tuple(keys[i].tolist())])
        if waiting and (paired[i] or waiting[0] == i):
            runs[heappop(waiting)] = i
    return runs[weights]


def _largest(work: Ints, counts: Ints) -> Ints:
    """The rows that none of the same work exceeds or equals in every count, sorted by work and counts.

    All messages are alike, and activations are at least as large as one: they contain their input. So of two rows no
    bytes are larger where neither their chunks' counts are nor the sum of their activations and messages.
    """
    chunks = counts.shape[1] - 4
    together = counts[:, : chunks // 2].sum(axis=1) + counts[:, OUTPUTS:RECEIVED].sum(axis=1)
    measure = np.column_stack([counts[:, :chunks], together])
    order = np.lexsort((*counts.T[::-1], -measure.sum(axis=1), *work[::-1]))
    same = np.cumsum(np.append(0, np.any(np.diff(work[:, order]), axis=0)))
    best = unexceeded(measure, order, same)
    return best[np.lexsort((*counts[best].T[::-1], *work[:, best][::-1]))]


def unexceeded(measure: Ints, order: Ints, same: Ints) -> Ints:
    """The rows that none before them in `order` exceeds or equals in every number of `measure` (rows, numbers).

    The largest sums come first in `order`; only rows with equal entries of `same`, which follows it, are compared.
    """
    found = [order[:0]]
    while len(order):
        _, leader, of = np.unique(same, return_index=True, return_inverse=True)
        found.append(order[leader])
        open_ = (measure[order] > measure[order[leader]][of]).any(axis=1)
        order, same = order[open_], same[open_]
    return np.concatenate(found)


class Growth(NamedTuple):
    """Occupancies of a schedule for M = `least` + i * `period` micro-batches: `counts` + i * `slope`.

    After two micro-batches per pipeline rank a schedule repeats itself with every further one per rank: its counts
    stay, or (GPipe, breadth-first: all forwards first) grow.
    """

    least: int
    period: int
    stages_of: tuple[tuple[int, ...], ...]  # of every rank
    work: tuple[Work, ...]
    counts: NDArray[np.int64]  # (rows, 2 * chunks + 4): kept, deferred, messages
    slope: NDArray[np.int64]

    def at(self, microbatches: int) -> NDArray[np.int64]:
        return self.counts + (microbatches - self.least) // self.period * self.slope


def growth(
    name: str, pipeline_parallel: int, virtual_stages: int, microbatches: int, *, in_context: bool = False
) -> Growth:
    """The occupancies of a named schedule for `microbatches`, and for every number a period further."""
    least = (REPEATS + 1) * pipeline_parallel + microbatches % pipeline_parallel
    if microbatches > least:
        first, further = (ramps(name, pipeline_parallel, virtual_stages, m)[0] for m in (least, microbatches))
        if first.most or (first.kept == further.kept and least % pipeline_parallel == 0):  # it repeats what it holds
            return _growth(name, pipeline_parallel, virtual_stages, least, in_context)
        repeating = _repeating(name, pipeline_parallel, virtual_stages, least, in_context)
        if repeating is not None:
            return repeating
    return _growth(name, pipeline_parallel, virtual_stages, microbatches, in_context)


@lru_cache(maxsize=4096)
def _growth(name: str, pipeline_parallel: int, virtual_stages: int, microbatches: int, in_context: bool) -> Growth:
    first = build(name, pipeline_parallel, microbatches, virtual_stages)
    work, counts = occupancies(first, in_context=in_context)
    stages_of = tuple(first.stages_of(rank) for rank in range(first.num_ranks))
    return Growth(microbatches, pipeline_parallel, stages_of, work, counts, np.zeros_like(counts))


@lru_cache(maxsize=4096)
def _repeating(name: str, pipeline_parallel: int, virtual_stages: int, least: int, in_context: bool) -> Growth | None:
    """The growth from `least` on; None where the next periods do not follow it."""
    tables = (
        _growth(name, pipeline_parallel, virtual_stages, least + i * pipeline_parallel, in_context) for i in range(3)
    )
    first, second = next(tables), next(tables)
    if first.work != second.work:
        return None
    slope = second.counts - first.counts
    if slope.any():
        third = next(tables)
        if third.work != first.work or (third.counts - second.counts != slope).any():
            return None
    return first._replace(slope=slope)

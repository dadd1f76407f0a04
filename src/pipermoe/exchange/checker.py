"""Proves a plan before it runs: it ends, nothing is overwritten, and every output byte is the right input byte.

No process, no network and no data: byte ranges are traced back from the outputs to the inputs, so a plan of a million
messages is checked in seconds.
"""

from __future__ import annotations

import numpy as np

from pipermoe.exchange.plan import INPUT, OUTPUT, STAGING, ExchangePlan, Ints, ranges, segment_offsets


class InvalidPlan(ValueError):
    """The plan does not perform its all-to-all; the message names the first message or rank that shows it."""


def check(plan: ExchangePlan) -> None:
    """Raises InvalidPlan unless the plan ends without deadlock and puts every byte in its place exactly once.

    - Ends: dependencies point backwards and concern what the source itself has sent or received, so the first
      unfinished message can always start, with any buffering, if receives are posted or buffered and sends wait for
      nothing else.
    - Matched: every message has one source and one destination; both sides derive order and size from the plan.
    - Complete: the ranges written in every output are disjoint, fill it, and come from the right place of the right
      input; what is read from a staging buffer was written by messages that the reader depends on.
    """
    _check_messages(plan)
    _check_dependencies(plan)
    _check_bounds(plan)
    memory = _Memory(plan)
    _check_written_once(plan, memory)
    _check_staged_before_read(plan, memory)
    _check_origins(plan, memory)


class _Memory:
    """All buffers of all ranks in one address space: base[rank, buffer] + offset."""

    def __init__(self, plan: ExchangePlan):
        self.size = np.stack([plan.counts.sum(axis=1), plan.counts.sum(axis=0), plan.staging_bytes], axis=1)
        end = np.cumsum(self.size.ravel()).reshape(self.size.shape)
        self.base = end - self.size
        f, m = plan.fragments, plan.message_of_fragment
        self.read = self.base[plan.source[m], f.source_buffer] + f.source_offset
        self.written = self.base[plan.destination[m], f.destination_buffer] + f.destination_offset
        self.order = np.argsort(self.written, kind="stable")
        self.begin = self.written[self.order]
        self.end = self.begin + f.length[self.order]

    def writers(self, begin: Ints, length: Ints) -> tuple[Ints, Ints]:
        """(index into the ranges asked for, fragment that wrote part of it) for every overlap."""
        low = np.searchsorted(self.end, begin, side="right")
        high = np.searchsorted(self.begin, begin + length, side="left")
        return np.repeat(np.arange(len(begin)), np.maximum(high - low, 0)), self.order[ranges(low, high)]


def _require(holds, describe) -> None:
    """Raises with the description of the first entry at which `holds` fails."""
    failing = np.flatnonzero(~np.asarray(holds))
    if len(failing):
        raise InvalidPlan(describe(int(failing[0])))


def _check_messages(plan: ExchangePlan) -> None:
    for name, column in (("source", plan.source), ("destination", plan.destination)):
        _require(
            (column >= 0) & (column < plan.num_ranks),
            lambda m, name=name, column=column: f"message {m} has {name} {column[m]} of {plan.num_ranks} ranks",
        )
    _require(plan.message_bytes > 0, lambda m: f"message {m} is empty")


def _check_dependencies(plan: ExchangePlan) -> None:
    message = np.repeat(np.arange(len(plan)), np.diff(plan.first_dependency))
    needed = plan.dependency
    _require(
        (needed >= 0) & (needed < message),
        lambda i: (
            f"message {message[i]} depends on message {needed[i]}: must be an earlier one, or the plan may not end"
        ),
    )
    source = plan.source[message]
    _require(
        (source == plan.source[needed]) | (source == plan.destination[needed]),
        lambda i: (
            f"message {message[i]} depends on message {needed[i]}, which rank {source[i]} neither sends nor receives"
        ),
    )


def _check_bounds(plan: ExchangePlan) -> None:
    f, m = plan.fragments, plan.message_of_fragment
    size = {
        INPUT: plan.counts.sum(axis=1),
        OUTPUT: plan.counts.sum(axis=0),
        STAGING: plan.staging_bytes,
    }
    ends = (
        ("reads", plan.source, f.source_buffer, f.source_offset, (INPUT, STAGING)),
        ("writes", plan.destination, f.destination_buffer, f.destination_offset, (OUTPUT, STAGING)),
    )
    for verb, rank, buffer, offset, allowed in ends:
        _require(np.isin(buffer, allowed), lambda i, verb=verb: f"message {m[i]} {verb} a buffer it must not")
        sizes = np.stack([size[INPUT], size[OUTPUT], size[STAGING]], axis=1)[rank[m], buffer]
        _require(
            (offset >= 0) & (f.length > 0) & (offset + f.length <= sizes),
            lambda i, verb=verb, offset=offset, sizes=sizes: (
                f"message {m[i]} {verb} bytes {offset[i]}..{offset[i] + f.length[i]} of a buffer of {sizes[i]}"
            ),
        )


def _check_written_once(plan: ExchangePlan, memory: _Memory) -> None:
    m = plan.message_of_fragment
    _require(
        memory.begin[1:] >= memory.end[:-1],
        lambda i: f"messages {m[memory.order[i]]} and {m[memory.order[i + 1]]} write the same bytes",
    )
    f = plan.fragments
    arrived = np.zeros(plan.num_ranks, dtype=np.int64)
    out = f.destination_buffer == OUTPUT
    np.add.at(arrived, plan.destination[m][out], f.length[out])
    expected = plan.counts.sum(axis=0)
    _require(arrived == expected, lambda r: f"rank {r} receives {arrived[r]} of {expected[r]} bytes")


def _check_staged_before_read(plan: ExchangePlan, memory: _Memory) -> None:
    f, m = plan.fragments, plan.message_of_fragment
    staged = np.flatnonzero(f.source_buffer == STAGING)
    reader, writer = memory.writers(memory.read[staged], f.length[staged])
    covered = np.zeros(len(staged), dtype=np.int64)
    overlap = np.minimum(
        memory.read[staged][reader] + f.length[staged][reader], memory.written[writer] + f.length[writer]
    ) - np.maximum(memory.read[staged][reader], memory.written[writer])
    np.add.at(covered, reader, overlap)
    _require(covered == f.length[staged], lambda i: f"message {m[staged[i]]} reads staged bytes that nobody writes")
    wanted = m[staged][reader] * len(plan) + m[writer]
    message = np.repeat(np.arange(len(plan)), np.diff(plan.first_dependency))
    known = message * len(plan) + plan.dependency
    _require(
        np.isin(wanted, known),
        lambda i: f"message {m[staged[reader[i]]]} reads what message {m[writer[i]]} writes but does not wait for it",
    )


def _check_origins(plan: ExchangePlan, memory: _Memory) -> None:
    """Follows every output range back through the staging buffers; each hop is an earlier message, so this ends."""
    f = plan.fragments
    now = np.flatnonzero(f.destination_buffer == OUTPUT)
    target, origin, length, fragment = memory.written[now], memory.read[now], f.length[now], now
    while len(fragment):
        staged = f.source_buffer[fragment] == STAGING
        _check_direct(plan, memory, target[~staged], origin[~staged], length[~staged])
        target, origin, length = target[staged], origin[staged], length[staged]
        index, writer = memory.writers(origin, length)
        begin = np.maximum(origin[index], memory.written[writer])
        stop = np.minimum(origin[index] + length[index], memory.written[writer] + f.length[writer])
        target = target[index] + begin - origin[index]
        origin = memory.read[writer] + begin - memory.written[writer]
        length, fragment = stop - begin, writer


def _check_direct(plan: ExchangePlan, memory: _Memory, target: Ints, origin: Ints, length: Ints) -> None:
    """Whether ranges of outputs come from the inputs they belong to: both lie in the same segment at the same place."""
    before, above = segment_offsets(plan.counts)
    nonzero = plan.counts > 0
    s, d = np.nonzero(nonzero)
    start = memory.base[d, OUTPUT] + above[s, d]
    order = np.argsort(start)
    s, d, start = s[order], d[order], start[order]
    segment = np.searchsorted(start, target, side="right") - 1
    s, d, inner = s[segment], d[segment], target - start[segment]
    expected = memory.base[s, INPUT] + before[s, d] + inner
    _require(
        (origin == expected) & (inner + length <= plan.counts[s, d]),
        lambda i: f"rank {d[i]} gets wrong bytes where those of rank {s[i]} belong (at byte {inner[i]} of them)",
    )

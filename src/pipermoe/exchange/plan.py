"""ExchangePlan: the steps of an all-to-all as data. One of the four decisions.

An all-to-all moves `counts[s, d]` bytes from rank s to rank d. Every rank has three buffers of bytes:

    INPUT    what it sends, ordered by destination rank   (counts[s, :] side by side)
    OUTPUT   what it receives, ordered by source rank     (counts[:, d] side by side)
    STAGING  what it holds for others on the way; every byte is written at most once per exchange

A message goes from one rank to one rank (a copy when they are the same) and carries fragments: byte ranges gathered at
the source, side by side on the wire, scattered at the destination. It starts when the messages it depends on have
completed: those that its source received (its data has arrived) or sent (a window of sends is full). Nothing else
orders an exchange; there are no barriers. Dependencies point at smaller message numbers, so a plan cannot deadlock:
of the unfinished messages the first one always can go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
INPUT, OUTPUT, STAGING = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Fragments:
    """Columns of F byte ranges: where each is read at the message's source and written at its destination."""

    source_buffer: Ints
    source_offset: Ints
    destination_buffer: Ints
    destination_offset: Ints
    length: Ints

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, index) -> Fragments:
        return Fragments(*(column[index] for column in self.columns))

    @property
    def columns(self) -> tuple[Ints, ...]:
        return (
            self.source_buffer,
            self.source_offset,
            self.destination_buffer,
            self.destination_offset,
            self.length,
        )

    @classmethod
    def join(cls, parts: Sequence[Fragments]) -> Fragments:
        return cls(*(np.concatenate(columns) for columns in zip(*(part.columns for part in parts), strict=True)))


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """M messages in an order that respects their dependencies, with F fragments and D dependencies.

    Message m has the fragments first_fragment[m]:first_fragment[m + 1] and the dependencies
    dependency[first_dependency[m]:first_dependency[m + 1]], all smaller than m.
    """

    name: str
    counts: Ints  # [P, P] bytes from source to destination
    phases: tuple[str, ...]
    source: Ints  # [M]
    destination: Ints  # [M]
    phase: Ints  # [M]
    first_fragment: Ints  # [M + 1]
    fragments: Fragments  # [F]
    first_dependency: Ints  # [M + 1]
    dependency: Ints  # [D]
    staging_bytes: Ints  # [P]
    step: Ints = field(repr=False)  # [M] the order inside a phase
    window: int = 0  # steps in flight per rank, 0: all

    @property
    def num_ranks(self) -> int:
        return len(self.counts)

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def message_bytes(self) -> Ints:
        """Bytes of every message on the wire, [M]."""
        total = np.concatenate([[0], np.cumsum(self.fragments.length)])
        return total[self.first_fragment[1:]] - total[self.first_fragment[:-1]]

    @cached_property
    def message_of_fragment(self) -> Ints:
        return np.repeat(np.arange(len(self)), np.diff(self.first_fragment))

    def dependencies_of(self, message: int) -> Ints:
        return self.dependency[self.first_dependency[message] : self.first_dependency[message + 1]]

    @cached_property
    def level(self) -> Ints:
        """How many messages must complete one after the other before message m starts, [M]."""
        level = np.zeros(len(self), dtype=np.int64)
        pending = np.flatnonzero(np.diff(self.first_dependency))
        for m in pending.tolist():
            level[m] = level[self.dependencies_of(m)].max() + 1
        return level

    def reversed(self) -> ExchangePlan:
        """The plan of the transposed counts in which every byte goes back the way it came: the backward pass."""
        f, m = self.fragments, self.message_of_fragment
        swap = np.array([OUTPUT, INPUT, STAGING])
        back = slice(None, None, -1)
        fragments = Fragments(
            swap[f.destination_buffer],
            f.destination_offset,
            swap[f.source_buffer],
            f.source_offset,
            f.length,
        )
        return assemble(
            f"{self.name} reversed",
            np.ascontiguousarray(self.counts.T),
            self.phases[back],
            source=self.destination[m],
            destination=self.source[m],
            phase=len(self.phases) - 1 - self.phase[m],
            step=self.step.max(initial=0) - self.step[m],
            fragments=fragments,
            window=self.window,
        )

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.num_ranks} ranks, {len(self)} messages, {self.message_bytes.sum()} bytes"]
        for number, phase in enumerate(self.phases):
            here = self.phase == number
            local = here & (self.source == self.destination)
            lines.append(
                f"  {phase:8} {here.sum() - local.sum():6} messages {self.message_bytes[here & ~local].sum():12} bytes"
                f"  {local.sum():6} copies"
            )
        return "\n".join(lines)


def byte_matrix(counts: ArrayLike) -> Ints:
    """`counts` as a [P, P] matrix of bytes; ValueError names what is wrong with it."""
    matrix = np.asarray(counts)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"counts must be a square matrix of bytes, not of shape {matrix.shape}")
    if not np.issubdtype(matrix.dtype, np.integer):
        raise ValueError(f"counts must be whole bytes, not {matrix.dtype}")
    if (matrix < 0).any():
        source, destination = np.argwhere(matrix < 0)[0]
        raise ValueError(f"counts[{source}, {destination}] = {matrix[source, destination]}: must be 0 or more bytes")
    return matrix.astype(np.int64)


def segment_offsets(counts: Ints) -> tuple[Ints, Ints]:
    """Where segment (s, d) begins in the input of s and in the output of d, each [P, P]."""
    before = np.zeros_like(counts)
    before[:, 1:] = np.cumsum(counts, axis=1)[:, :-1]
    above = np.zeros_like(counts)
    above[1:, :] = np.cumsum(counts, axis=0)[:-1, :]
    return before, above


def ranges(start: Ints, stop: Ints) -> Ints:
    """`start[0]..stop[0]-1, start[1]..stop[1]-1, ...` in one array."""
    length = np.maximum(stop - start, 0)
    total = np.cumsum(length)
    return np.arange(total[-1] if len(total) else 0) - np.repeat(total - length - start, length)


def assemble(
    name: str,
    counts: Ints,
    phases: Sequence[str],
    *,
    source: Ints,
    destination: Ints,
    phase: Ints,
    step: Ints,
    fragments: Fragments,
    window: int = 0,
) -> ExchangePlan:
    """The plan whose fragments of equal (phase, step, source, destination) travel in one message, in the order given.

    All columns have one entry per fragment. Messages are numbered by (phase, step, source). Every message depends on
    those that wrote what it reads from STAGING. A positive `window` lets a rank have that many steps of a phase in
    flight: a message waits for the send and the receive of its source `window` steps before.
    """
    kept = fragments.length > 0
    columns = [np.asarray(column, dtype=np.int64)[kept] for column in (phase, step, source, destination)]
    fragments = fragments[kept]
    order = np.lexsort(columns[::-1])  # stable: fragments keep their order inside a message
    phase, step, source, destination = (column[order] for column in columns)
    fragments = fragments[order]

    opens = np.ones(len(order), dtype=bool)  # whether a fragment is the first of its message
    if len(order):
        opens[1:] = np.any([np.diff(column) != 0 for column in (phase, step, source, destination)], axis=0)
    fragments, opens, first = _merge_adjacent(fragments, opens)
    phase, step, source, destination = (column[first][opens] for column in (phase, step, source, destination))
    first_fragment = np.append(np.flatnonzero(opens), len(opens)).astype(np.int64)

    staged = _staging_sizes(len(counts), source, destination, first_fragment, fragments)
    pairs = [_data_dependencies(source, destination, first_fragment, fragments)]
    if window:
        pairs += _window_dependencies(source, destination, phase, step, window)
    first_dependency, dependency = _group_dependencies(len(source), np.concatenate(pairs, axis=1))
    return ExchangePlan(
        name,
        counts,
        tuple(phases),
        source,
        destination,
        phase,
        first_fragment,
        fragments,
        first_dependency,
        dependency,
        staged,
        step,
        window,
    )


def _merge_adjacent(fragments: Fragments, opens: NDArray[np.bool_]) -> tuple[Fragments, NDArray[np.bool_], Ints]:
    """Neighbours of one message that also touch at both ends become one fragment."""
    if not len(fragments):
        return fragments, opens, np.zeros(0, dtype=np.int64)
    source_buffer, source_offset, destination_buffer, destination_offset, length = fragments.columns
    starts = opens.copy()
    starts[1:] |= (np.diff(source_buffer) != 0) | (np.diff(destination_buffer) != 0)
    starts[1:] |= np.diff(source_offset) != length[:-1]
    starts[1:] |= np.diff(destination_offset) != length[:-1]
    first = np.flatnonzero(starts)
    kept = fragments[first]
    merged = replace(kept, length=np.add.reduceat(length, first))
    return merged, opens[first], first


def _staging_sizes(num_ranks: int, source: Ints, destination: Ints, first_fragment: Ints, fragments: Fragments) -> Ints:
    size = np.zeros(num_ranks, dtype=np.int64)
    written = fragments.destination_buffer == STAGING
    rank = np.repeat(destination, np.diff(first_fragment))[written]
    np.maximum.at(size, rank, (fragments.destination_offset + fragments.length)[written])
    return size


def _data_dependencies(source: Ints, destination: Ints, first_fragment: Ints, fragments: Fragments) -> Ints:
    """Pairs (reader, writer) of messages, [2, D]: the reader takes from STAGING what the writer put there."""
    message = np.repeat(np.arange(len(source)), np.diff(first_fragment))
    reads = np.flatnonzero(fragments.source_buffer == STAGING)
    writes = np.flatnonzero(fragments.destination_buffer == STAGING)
    if not len(reads) or not len(writes):
        return np.zeros((2, 0), dtype=np.int64)
    stride = 1 + int(
        max(
            (fragments.source_offset + fragments.length)[reads].max(),
            (fragments.destination_offset + fragments.length)[writes].max(),
        )
    )
    begin = destination[message[writes]] * stride + fragments.destination_offset[writes]
    order = np.argsort(begin, kind="stable")
    writes, begin = writes[order], begin[order]
    end = begin + fragments.length[writes]
    wanted = source[message[reads]] * stride + fragments.source_offset[reads]
    low = np.searchsorted(end, wanted, side="right")
    high = np.searchsorted(begin, wanted + fragments.length[reads], side="left")
    reader = np.repeat(message[reads], np.maximum(high - low, 0))
    return np.stack([reader, message[writes[ranges(low, high)]]])


def _window_dependencies(source: Ints, destination: Ints, phase: Ints, step: Ints, window: int) -> list[Ints]:
    """Pairs (message, earlier send) and (message, earlier receive) of its source, `window` busy steps back."""
    pairs = []
    crossing = np.flatnonzero(source != destination)
    for end in (source, destination):
        # the steps at which this rank sends (or receives), in order; the message `window` of them before
        key = (end * (phase.max(initial=0) + 1) + phase)[crossing]
        order = np.lexsort((step[crossing], key))
        ranked, ranked_key, ranked_step = crossing[order], key[order], step[crossing][order]
        scale = int(step.max(initial=0)) + 1
        position = np.searchsorted(
            ranked_key * scale + ranked_step,
            (source * (phase.max(initial=0) + 1) + phase)[crossing] * scale + step[crossing],
        )
        earlier = position - window
        mine = (source * (phase.max(initial=0) + 1) + phase)[crossing]
        valid = earlier >= 0
        valid[valid] &= ranked_key[earlier[valid]] == mine[valid]
        pairs.append(np.stack([crossing[valid], ranked[earlier[valid]]]))
    return pairs


def _group_dependencies(num_messages: int, pairs: Ints) -> tuple[Ints, Ints]:
    """Sorted, unique (message, dependency) pairs as row starts and one column of dependencies."""
    unique = np.unique(pairs[0] * max(num_messages, 1) + pairs[1])
    message, dependency = np.divmod(unique, max(num_messages, 1))
    first = np.searchsorted(message, np.arange(num_messages + 1))
    return first.astype(np.int64), dependency.astype(np.int64)

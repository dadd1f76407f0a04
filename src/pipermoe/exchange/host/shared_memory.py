"""Messages between the ranks of a node through shared memory: one copy in, one copy out, a bell to wake up.

For every ordered pair of local ranks there are two counters, of messages sent and of messages taken. They only grow
(modulo 2^32), so nothing is ever reset. Every rank writes into a region of its own, of two halves that exchanges use in
turn; it writes a half again once its messages of the exchange before last have been taken. Nobody else writes there, so
ranks that have nothing to say to each other may be any number of exchanges apart. A rank sleeps at its bell, a named
pipe.

Needs Linux and, in Python, a processor that keeps stores in order (x86-64); `native.c` orders them itself.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.errors import MachineError

FOLDER = "/dev/shm"
WORDS_PER_LINE = 16  # a counter has a cache line of 64 bytes to itself
SENT, TAKEN = 0, 1
_MASK = 0xFFFFFFFF


def available() -> bool:
    """Whether this machine can exchange through shared memory as this package does it."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and os.access(FOLDER, os.W_OK)


class SharedNode:
    """The ranks of one node, numbered 0..R-1, and the memory between them. All of them begin the same exchanges.

    To set it up all ranks of the node call `create`, then `attach`, then `unlink`, and wait for each other in between.
    """

    def __init__(self, name: str, index: int, size: int):
        self.name, self.index, self.size = name, index, size
        self.sent, self._taken = [0] * size, [0] * size
        self.turn = 0
        self._capacity = [0] * size  # bytes of a half of each rank's region
        self._halves: list[list[NDArray[np.uint8]]] = [[np.zeros(0, dtype=np.uint8)] * size for _ in range(2)]
        self._addresses = np.zeros((2, size), dtype=np.uint64)
        self._free_at = [[0] * size, [0] * size]
        words = 2 * size * size + size  # the last R say who sleeps, in native.c
        self._control_bytes = _pages(words * WORDS_PER_LINE * 4)
        self._end = self._control_bytes  # of the file

    def create(self) -> None:
        """This rank's bell, and on the first rank the file."""
        os.mkfifo(self._bell_path(self.index), 0o600)
        if self.index == 0:
            descriptor = os.open(self._path(), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.posix_fallocate(descriptor, 0, self._control_bytes)  # fails now, not with a bus error at the first write
            os.close(descriptor)

    def attach(self) -> None:
        self._file = os.open(self._path(), os.O_RDWR)
        self.bells = [os.open(self._bell_path(r), os.O_RDWR | os.O_NONBLOCK) for r in range(self.size)]
        self.control = mmap.mmap(self._file, self._control_bytes)
        self._words = memoryview(self.control).cast("I")

    def unlink(self) -> None:
        """The names go away; what they named stays as long as a rank has it open."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._bell_path(self.index))
        if self.index == 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path())

    def close(self) -> None:
        """The memory goes when the last rank has closed it."""
        for descriptor in (self._file, *self.bells):
            os.close(descriptor)

    def begin(self, written: Sequence[int]) -> None:
        """Starts an exchange in which local rank r writes `written[r]` bytes: the same on all ranks of the node."""
        for rank, size in enumerate(written):
            if size > self._capacity[rank]:
                self._grow(rank, size)
        self.turn ^= 1

    def region(self, rank: int) -> NDArray[np.uint8]:
        """What local rank `rank` writes in this exchange."""
        return self._halves[self.turn][rank]

    @property
    def regions_address(self) -> int:
        """Where the addresses of all ranks' regions in this exchange lie, [R]."""
        return self._addresses[self.turn].ctypes.data

    def end(self) -> None:
        """Remembers up to where the others must have read before this rank writes this half again."""
        self._free_at[self.turn] = list(self.sent)

    @property
    def free(self) -> bool:
        """Whether this rank may write: the others have read what it left in this half."""
        taken = [self._words[self._word(TAKEN, self.index, peer)] for peer in range(self.size)]
        behind = [(there - wanted) & 1 << 31 for there, wanted in zip(taken, self._free_at[self.turn], strict=True)]
        return not any(count for peer, count in enumerate(behind) if peer != self.index)

    def send(self, peer: int) -> None:
        """The next message for local rank `peer` lies in its slot."""
        self.sent[peer] = (self.sent[peer] + 1) & _MASK
        self._words[self._word(SENT, self.index, peer)] = self.sent[peer]
        with contextlib.suppress(BlockingIOError):  # the bell is full, so it rings
            os.write(self.bells[peer], b"!")

    def has_message(self, peer: int) -> bool:
        """Whether local rank `peer` has sent more than has been taken."""
        return self._words[self._word(SENT, peer, self.index)] != self._taken[peer]

    def take(self, peer: int) -> None:
        """The oldest message from `peer` has been copied out. Rings no bell: who needs to know looks again."""
        self._taken[peer] = (self._taken[peer] + 1) & _MASK
        self._words[self._word(TAKEN, peer, self.index)] = self._taken[peer]

    def _grow(self, rank: int, needed: int) -> None:
        """A larger region at the end of the file: others may still read the old one. The same place on all ranks."""
        capacity = self._capacity[rank] = max(mmap.ALLOCATIONGRANULARITY, 1 << (needed - 1).bit_length())
        try:
            os.posix_fallocate(self._file, self._end, 2 * capacity)
            region = mmap.mmap(self._file, 2 * capacity, offset=self._end)
        except OSError as error:
            raise MachineError(f"{FOLDER}: {2 * capacity} bytes of shared memory: {error.strerror}") from error
        self._end += 2 * capacity
        both = np.frombuffer(region, dtype=np.uint8)
        for turn, half in enumerate((both[:capacity], both[capacity:])):
            self._halves[turn][rank], self._addresses[turn, rank] = half, half.ctypes.data

    def _word(self, kind: int, source: int, destination: int) -> int:
        return ((kind * self.size + source) * self.size + destination) * WORDS_PER_LINE

    def _path(self) -> str:
        return f"{FOLDER}/{self.name}"

    def _bell_path(self, index: int) -> str:
        return f"{FOLDER}/{self.name}.bell{index}"


def _pages(size: int) -> int:
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY

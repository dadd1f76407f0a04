"""Messages between the ranks of a node through shared memory: one copy in, one copy out, a bell to wake up.

For every ordered pair of local ranks there are two counters, of messages sent and of messages taken. They only grow
(modulo 2^32), so nothing is ever reset. The bytes lie in an arena of two halves that exchanges use in turn; a half is
written again once the messages of the exchange before last have been taken. A rank sleeps at its bell, a named pipe.

Needs Linux and, in Python, a processor that keeps stores in order (x86-64); `native.c` orders them itself.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import sys

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
        self.capacity = self.turn = 0
        self.half: NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
        self.half_address = 0
        self._halves, self._addresses = [self.half, self.half], [0, 0]
        self._free_at = [[0] * size, [0] * size]
        self._arena_at = _pages(self._control_bytes())

    def create(self) -> None:
        """This rank's bell, and on the first rank the file."""
        os.mkfifo(self._bell_path(self.index), 0o600)
        if self.index == 0:
            descriptor = os.open(self._path(), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.posix_fallocate(descriptor, 0, self._arena_at)  # fails now, not with a bus error at the first write
            os.close(descriptor)

    def attach(self) -> None:
        self._file = os.open(self._path(), os.O_RDWR)
        self.bells = [os.open(self._bell_path(r), os.O_RDWR | os.O_NONBLOCK) for r in range(self.size)]
        self.control = mmap.mmap(self._file, self._arena_at)
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

    def begin(self, needed: int) -> None:
        """Starts an exchange that needs `needed` bytes of shared memory, the same on all ranks of the node."""
        if needed > self.capacity:
            self._grow(needed)
        self.turn ^= 1
        self.half, self.half_address = self._halves[self.turn], self._addresses[self.turn]

    def end(self) -> None:
        """Remembers up to where the others must have read before this half is written again."""
        self._free_at[self.turn] = list(self.sent)

    @property
    def free(self) -> bool:
        """Whether this half may be written: the others have read what was in it."""
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

    def _grow(self, needed: int) -> None:
        """A larger arena behind the old one, in which others may still be reading. All ranks come to the same place."""
        self._arena_at += 2 * self.capacity
        self.capacity = max(1 << 16, 1 << (needed - 1).bit_length())
        try:
            os.posix_fallocate(self._file, self._arena_at, 2 * self.capacity)
            arena = mmap.mmap(self._file, 2 * self.capacity, offset=self._arena_at)
        except OSError as error:
            raise MachineError(f"{FOLDER}: {2 * self.capacity} bytes of shared memory: {error.strerror}") from error
        both = np.frombuffer(arena, dtype=np.uint8)
        self._halves = [both[: self.capacity], both[self.capacity :]]
        self._addresses = [half.ctypes.data for half in self._halves]

    def _control_bytes(self) -> int:
        return (2 * self.size * self.size + self.size) * WORDS_PER_LINE * 4  # the last R say who sleeps, in native.c

    def _word(self, kind: int, source: int, destination: int) -> int:
        return ((kind * self.size + source) * self.size + destination) * WORDS_PER_LINE

    def _path(self) -> str:
        return f"{FOLDER}/{self.name}"

    def _bell_path(self, index: int) -> str:
        return f"{FOLDER}/{self.name}.bell{index}"


def _pages(size: int) -> int:
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY

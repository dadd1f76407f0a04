"""Messages between the ranks of a node through shared memory: one copy in, one copy out, one futex to wake up.

For every ordered pair of local ranks there are two counters, of messages sent and of messages taken. They only grow
(modulo 2^32), so nothing is ever reset. The bytes lie in an arena of two halves that exchanges use in turn; a half is
written again once the messages of the exchange before last have been taken.

Needs Linux and a processor that keeps stores in order (x86-64): then plain stores and the kernel's futex suffice.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
import time
from typing import Protocol

import numpy as np

from pipermoe.specs.errors import MachineError

FOLDER = "/dev/shm"
_WORDS_PER_LINE = 16  # a counter has a cache line of 64 bytes to itself
_FUTEX = {"x86_64": 202}
_WAIT, _WAKE = 0, 1
_MASK = 0xFFFFFFFF
_POLL_SECONDS = 0.5  # a sleeper that is woken looks no more often than this
_ACK_POLL_SECONDS = 1e-4
_BUSY_POLL_SECONDS = 1e-3


def available() -> bool:
    """Whether this machine can exchange through shared memory as this file does it."""
    return sys.platform == "linux" and platform.machine() in _FUTEX and os.access(FOLDER, os.W_OK)


class Background(Protocol):
    """Something that must go on while a rank waits for its node: messages to others that are not yet sent."""

    @property
    def busy(self) -> bool: ...

    def progress(self, seconds: float = 0.0) -> bool: ...


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class Segment:
    """A file in memory, mapped; the name goes away once all ranks of the node have mapped it."""

    def __init__(self, name: str, size: int, create: bool):
        self.path = f"{FOLDER}/{name}"
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        descriptor = os.open(self.path, flags, 0o600)
        try:
            if create:
                os.posix_fallocate(descriptor, 0, size)  # fails now, not with a bus error at the first write
            self.memory = mmap.mmap(descriptor, size)
        except OSError as error:
            if create:
                os.unlink(self.path)
            raise MachineError(f"{self.path}: {size} bytes of shared memory: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def unlink(self) -> None:
        os.unlink(self.path)


class SharedNode:
    """The ranks of one node, numbered 0..R-1, and the memory between them. All of them call the same methods."""

    def __init__(self, name: str, index: int, size: int, timeout: float):
        self.name, self.index, self.size, self.timeout = name, index, size, timeout
        self.control: Segment | None = None
        self.arena = np.zeros(0, dtype=np.uint8)
        self.capacity = self.generation = self.turn = 0
        self._half_is_free_at = [[0] * size, [0] * size]
        self._sent, self._taken = [0] * size, [0] * size
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._futex = _FUTEX[platform.machine()]
        self._barriers = 0

    # Setting up: rank 0 creates, the caller synchronises, the others attach, the caller synchronises, rank 0 unlinks.
    def create_control(self) -> None:
        self._attach(Segment(f"{self.name}.control", self._control_bytes(), create=True))

    def attach_control(self) -> None:
        self._attach(Segment(f"{self.name}.control", self._control_bytes(), create=False))

    def unlink_control(self) -> None:
        if self.control is not None and self.index == 0:
            self.control.unlink()

    def _control_bytes(self) -> int:
        return 3 * self.size * self.size * _WORDS_PER_LINE * 4

    def _attach(self, segment: Segment) -> None:
        self.control = segment
        self._words = memoryview(segment.memory).cast("I")
        self._base = ctypes.addressof(ctypes.c_uint32.from_buffer(segment.memory))

    def _word(self, kind: int, source: int, destination: int) -> int:
        return ((kind * self.size + source) * self.size + destination) * _WORDS_PER_LINE

    def begin(self, needed: int) -> None:
        """Starts an exchange that needs `needed` bytes of shared memory, the same on all ranks of the node."""
        if needed > self.capacity:
            self._grow(needed)
        self.turn ^= 1
        self._free = False

    def end(self) -> None:
        """Remembers up to where the others must have read before this half is written again."""
        self._half_is_free_at[self.turn] = list(self._sent)

    def slot(self, offset: int, length: int) -> np.ndarray:
        """The bytes of one message in the half of this turn."""
        start = self.turn * self.capacity + offset
        return self.arena[start : start + length]

    def wait_until_free(self) -> None:
        """Before the first write of an exchange."""
        if not self._free:
            for peer, count in enumerate(self._half_is_free_at[self.turn]):
                if peer != self.index:
                    self._wait(self._word(1, self.index, peer), count, peer, pause=_ACK_POLL_SECONDS)
            self._free = True

    def send(self, peer: int) -> None:
        """The next message for local rank `peer` lies in its slot."""
        self._sent[peer] = (self._sent[peer] + 1) & _MASK
        self._signal(self._word(0, self.index, peer), self._sent[peer])

    def receive(self, peer: int, meanwhile: Background | None = None) -> None:
        """Waits for the next message from local rank `peer`, while `meanwhile` goes on with what it has to do."""
        self._wait(self._word(0, peer, self.index), (self._taken[peer] + 1) & _MASK, peer, meanwhile=meanwhile)

    def take(self, peer: int) -> None:
        """The message just received has been copied out. Wakes nobody: who waits for this, rarely, looks again."""
        self._taken[peer] = (self._taken[peer] + 1) & _MASK
        self._words[self._word(1, peer, self.index)] = self._taken[peer]

    def barrier(self) -> None:
        """All ranks of the node have come here."""
        self._barriers += 1
        for peer in range(self.size):
            self._signal(self._word(2, self.index, peer), self._barriers)
        for peer in range(self.size):
            self._wait(self._word(2, peer, self.index), self._barriers, peer)

    def _grow(self, needed: int) -> None:
        self.generation += 1
        self.capacity = max(1 << 16, 1 << (needed - 1).bit_length())
        name = f"{self.name}.{self.generation}"
        created = Segment(name, 2 * self.capacity, create=True) if self.index == 0 else None
        try:
            self.barrier()
            segment = created or Segment(name, 2 * self.capacity, create=False)
            self.barrier()
        finally:
            if created is not None:
                created.unlink()  # also when a rank did not come: nothing stays behind
        self.arena = np.frombuffer(segment.memory, dtype=np.uint8)
        self._half_is_free_at = [[0] * self.size, [0] * self.size]
        for half in self._half_is_free_at:  # the new arena is free: nothing in it is waiting to be read
            half[:] = [self._words[self._word(1, self.index, peer)] for peer in range(self.size)]

    def _signal(self, word: int, value: int) -> None:
        self._words[word] = value
        self._libc.syscall(self._futex, ctypes.c_void_p(self._base + word * 4), _WAKE, _MASK >> 1, None, None, 0)

    def _wait(
        self, word: int, target: int, peer: int, pause: float = _POLL_SECONDS, meanwhile: Background | None = None
    ) -> None:
        deadline = 0.0
        while (target - (now := self._words[word])) & _MASK < 1 << 31 and now != target:
            clock = time.monotonic()
            deadline = deadline or clock + self.timeout
            if clock > deadline:
                raise MachineError(f"local rank {peer} of this node has not answered within {self.timeout:g} s")
            if meanwhile is not None and meanwhile.busy:
                meanwhile.progress()
                pause = _BUSY_POLL_SECONDS
            limit = _Timespec(0, int(pause * 1e9))
            address = ctypes.c_void_p(self._base + word * 4)
            result = self._libc.syscall(self._futex, address, _WAIT, now, ctypes.byref(limit), None, 0)
            if result and ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
                raise MachineError(f"futex: {os.strerror(ctypes.get_errno())}")

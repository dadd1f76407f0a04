"""Runs a program in Python: one loop that starts what is ready, takes what has come, and sleeps in one place.

`native.c` is the same loop in C, for small messages, where Python's time per message is what an exchange takes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from pipermoe.exchange.host.program import Program, Range, Transfer, Way
from pipermoe.exchange.host.shared_memory import SharedNode
from pipermoe.exchange.host.sockets import Bytes, Sockets
from pipermoe.specs.errors import MachineError

LOOK_AGAIN_SECONDS = 1e-3  # while this rank's shared memory is not free, for which no bell rings
SLEEP_SECONDS = 0.2


class PythonLoop:
    """One execution of a program. `buffers` are INPUT, OUTPUT and STAGING; `local_index` numbers the node's ranks."""

    def __init__(
        self,
        program: Program,
        buffers: Sequence[Bytes],
        node: SharedNode | None,
        local_index: dict[int, int],
        sockets: Sockets,
    ):
        self.program, self.buffers, self.node, self.sockets = program, buffers, node, sockets
        self.local_index = local_index
        self.blocked = {send.message: len(send.waits) for send in program.sends}
        self.followers: dict[int, list[Transfer]] = {}
        for send in program.sends:
            for message in send.waits:
                self.followers.setdefault(message, []).append(send)
        self.ready = deque(send for send in program.sends if not send.waits)
        self.expected = {receive.message: receive for receive in program.receives}
        self.inbox: dict[int, deque[Transfer]] = {}  # what peers send through shared memory, in order
        self.landing: dict[int, Bytes] = {}  # where messages in several pieces land before they are scattered
        self.unfinished = len(program.sends) + len(program.receives)

    def complete(self) -> None:
        """Until all has arrived and left. MachineError if nothing at all moves for the sockets' timeout."""
        if self.node is not None:
            self.node.begin(self.program.written_bytes)
        for receive in self.program.receives:
            self._expect(receive)
        last = time.monotonic()
        while self.unfinished:
            moved = self._start_ready() or self._take_from_memory()
            for message in () if moved else self.sockets.wait(LOOK_AGAIN_SECONDS if self.ready else SLEEP_SECONDS):
                self._finish(message)
                moved = True
            if moved:
                last = time.monotonic()
            elif time.monotonic() > last + self.sockets.timeout:
                peer = next((receive.peer for receive in self.expected.values()), None)
                raise MachineError(f"rank {self.program.rank}: {stuck(peer, self.sockets.timeout)}")
        if self.node is not None:
            self.node.end()

    def _expect(self, receive: Transfer) -> None:
        if receive.way == Way.MEMORY:
            self.inbox.setdefault(self.local_index[receive.peer], deque()).append(receive)
            return
        if len(receive.ranges) == 1:
            into = self._slice(receive.ranges[0])
        else:
            into = self.landing[receive.message] = np.empty(receive.length, dtype=np.uint8)
        self.sockets.expect(receive.peer, receive.message, into)

    def _start_ready(self) -> bool:
        """Starts what is ready; whether anything was. Shared memory that is still being read holds up its messages."""
        started = False
        for _ in range(len(self.ready)):
            send = self.ready.popleft()
            if send.way == Way.MEMORY and self.node is not None and not self.node.free:
                self.ready.append(send)
                continue
            self._start(send)
            started = True
        return started

    def _start(self, send: Transfer) -> None:
        if send.way == Way.COPY:
            self._scatter(self._gathered(send), send.copied_to)
        elif send.way == Way.MEMORY:
            assert self.node is not None
            self._gather_into(self.node.region(self.node.index)[send.slot :], send.ranges)
            self.node.send(self.local_index[send.peer])
        elif not self.sockets.send(send.peer, send.message, self._gathered(send)):
            return
        self._finish(send.message)

    def _take_from_memory(self) -> bool:
        taken = False
        for peer, queue in self.inbox.items():
            while queue and self.node is not None and self.node.has_message(peer):
                receive = queue.popleft()
                region = self.node.region(peer)
                self._scatter(region[receive.slot : receive.slot + receive.length], receive.ranges)
                self.node.take(peer)
                self._finish(receive.message)
                taken = True
        return taken

    def _finish(self, message: int) -> None:
        """A message has arrived or left: what waited for it comes closer."""
        self.unfinished -= 1
        if (receive := self.expected.pop(message, None)) is not None and message in self.landing:
            self._scatter(self.landing.pop(message), receive.ranges)
        for send in self.followers.get(message, ()):
            self.blocked[send.message] -= 1
            if not self.blocked[send.message]:
                self.ready.append(send)

    def _slice(self, place: Range) -> Bytes:
        buffer, offset, length = place
        return self.buffers[buffer][offset : offset + length]

    def _gathered(self, send: Transfer) -> Bytes:
        """The bytes of a message, without a copy where they lie in one piece."""
        if len(send.ranges) == 1:
            return self._slice(send.ranges[0])
        wire = np.empty(send.length, dtype=np.uint8)
        self._gather_into(wire, send.ranges)
        return wire

    def _gather_into(self, wire: Bytes, ranges: Sequence[Range]) -> None:
        at = 0
        for place in ranges:
            wire[at : at + place[2]] = self._slice(place)
            at += place[2]

    def _scatter(self, wire: Bytes, ranges: Sequence[Range]) -> None:
        at = 0
        for place in ranges:
            self._slice(place)[:] = wire[at : at + place[2]]
            at += place[2]


def stuck(peer: int | None, timeout: float) -> str:
    """What to say when nothing has moved for `timeout` seconds."""
    waited_for = "sending" if peer is None else f"receiving from rank {peer}"
    return f"{waited_for} failed: nothing moved within {timeout:g} s"

"""Messages between nodes over sockets of our own: no rendezvous, and whatever arrives first is taken first.

gloo spends three TCP messages and two thread switches on a message (about 0.6 ms of processor time on two shared
cores), and its receiver's "ready" waits in the network's queues behind everybody's data. Here a message is its bytes,
in the order that the plan gives to a pair of ranks.

A rank connects to a peer when it first sends to it, and greets with its number and the group's secret. Sockets never
block: while a rank waits for one message it goes on writing and reading all others, so that no rank waits for another
that waits for it.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections import deque

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.errors import MachineError

Bytes = NDArray[np.uint8]
CAPACITY = 1 << 22  # bytes from one rank to one other, from which on the process group takes over
_SIOCGIFADDR = 0x8915
_GREETING = struct.Struct("<q16s")


def available() -> bool:
    return sys.platform == "linux"


def own_address() -> str:
    """The IPv4 address that others reach this rank by: of gloo's interface if one is named, else of the host name."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not interface:
        return socket.gethostbyname(socket.gethostname())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface[:15].encode()))
    return socket.inet_ntoa(answer[20:24])


class Arrival:
    """Bytes expected from a peer; `left` shrinks from its length to 0."""

    __slots__ = ("into", "left")

    def __init__(self, into: Bytes):
        self.into = memoryview(into.data)
        self.left = len(self.into)


class Wire:
    """Ordered bytes to and from every other rank."""

    def __init__(self, rank: int, secret: bytes, timeout: float):
        self.rank, self.secret, self.timeout = rank, secret, timeout
        self.listener = socket.create_server((own_address(), 0), backlog=1024)
        self.listener.setblocking(False)
        self.address = self.listener.getsockname()
        self.peers: list[tuple[str, int]] = []
        self._to: dict[int, socket.socket] = {}
        self._from: dict[int, socket.socket] = {}
        self._leaving: dict[int, deque[memoryview]] = {}
        self._arriving: dict[int, deque[Arrival]] = {}
        self._poll = select.epoll()
        self._poll.register(self.listener, select.EPOLLIN)
        self._ready: dict[int, tuple[str, int]] = {self.listener.fileno(): ("greet", -1)}

    def reaches(self, addresses: list[tuple[str, int]]) -> bool:
        """Whether the next rank can be connected to; remembers the addresses of all."""
        self.peers = addresses
        try:
            self._connect((self.rank + 1) % len(addresses))
        except OSError:
            return False
        return True

    def expect(self, peer: int, into: Bytes) -> Arrival:
        """The next bytes from `peer` belong there."""
        arrival = Arrival(into)
        queue = self._arriving.setdefault(peer, deque())
        queue.append(arrival)
        if len(queue) == 1 and peer in self._from:
            self._watch(self._from[peer], "read", peer)
        return arrival

    def send(self, peer: int, data: Bytes) -> None:
        """Starts to send; `data` must stay as it is until `flush`."""
        if peer not in self._to:
            try:
                self._connect(peer)
            except OSError as error:
                raise MachineError(f"rank {self.rank}: connecting to rank {peer} failed: {error}") from error
        queue = self._leaving.setdefault(peer, deque())
        queue.append(memoryview(data.data))
        if len(queue) == 1 and self._write(peer):
            self._watch(self._to[peer], "write", peer)

    def wait(self, arrival: Arrival, peer: int) -> None:
        """Until the bytes have arrived. MachineError if nothing at all moves for `timeout` seconds."""
        if arrival.left and peer in self._from:
            self._read(peer)
        deadline = time.monotonic() + self.timeout
        while arrival.left:
            if self.progress(self.timeout):
                deadline = time.monotonic() + self.timeout
            elif time.monotonic() >= deadline:
                raise MachineError(
                    f"rank {self.rank}: receiving from rank {peer} failed: nothing within {self.timeout:g} s"
                )

    def flush(self) -> None:
        """Until all that was to be sent is in the hands of the kernel."""
        while self.busy:
            if not self.progress(self.timeout):
                peers = [peer for peer, queue in self._leaving.items() if queue]
                raise MachineError(
                    f"rank {self.rank}: sending to rank {peers[0]} failed: nothing taken within {self.timeout:g} s"
                )

    @property
    def busy(self) -> bool:
        return any(self._leaving.values())

    def progress(self, seconds: float = 0.0) -> bool:
        """Writes and reads what it can, after at most `seconds` of waiting; whether anything moved."""
        events = self._poll.poll(seconds)
        for descriptor, _ in events:
            act, peer = self._ready.get(descriptor, ("", -1))
            if act == "greet":
                self._greet()
            elif act == "read":
                self._read(peer)
            elif act == "write" and not self._write(peer):
                self._unwatch(self._to[peer])
        return bool(events)

    def close(self) -> None:
        self._poll.close()
        for connection in (self.listener, *self._to.values(), *self._from.values()):
            connection.close()

    def _connect(self, peer: int) -> None:
        connection = socket.create_connection(self.peers[peer], timeout=self.timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(_GREETING.pack(self.rank, self.secret))
        connection.setblocking(False)
        self._to[peer] = connection

    def _greet(self) -> None:
        connection, _ = self.listener.accept()
        connection.settimeout(self.timeout)
        greeting = connection.recv(_GREETING.size, socket.MSG_WAITALL)
        number, secret = _GREETING.unpack(greeting) if len(greeting) == _GREETING.size else (-1, b"")
        if secret != self.secret:
            connection.close()  # not of this group
            return
        connection.setblocking(False)
        self._from[number] = connection
        if self._arriving.get(number):
            self._watch(connection, "read", number)

    def _write(self, peer: int) -> bool:
        """Writes to a peer until the socket is full; whether something is left."""
        queue = self._leaving[peer]
        try:
            while queue:
                count = self._to[peer].send(queue[0])
                if count == len(queue[0]):
                    queue.popleft()
                else:
                    queue[0] = queue[0][count:]
        except BlockingIOError:
            pass
        except OSError as error:
            raise MachineError(f"rank {self.rank}: sending to rank {peer} failed: {error}") from error
        return bool(queue)

    def _read(self, peer: int) -> None:
        """Reads what has come from a peer into the places that expect it."""
        queue = self._arriving.get(peer)
        try:
            while queue:
                first = queue[0]
                count = self._from[peer].recv_into(first.into[len(first.into) - first.left :])
                if not count:
                    raise ConnectionError("the connection was closed")
                first.left -= count
                if not first.left:
                    queue.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            raise MachineError(f"rank {self.rank}: receiving from rank {peer} failed: {error}") from error
        self._unwatch(self._from[peer])

    def _watch(self, connection: socket.socket, act: str, peer: int) -> None:
        if connection.fileno() not in self._ready:
            self._ready[connection.fileno()] = (act, peer)
            self._poll.register(connection, select.EPOLLIN if act == "read" else select.EPOLLOUT)

    def _unwatch(self, connection: socket.socket) -> None:
        if self._ready.pop(connection.fileno(), None):
            self._poll.unregister(connection)

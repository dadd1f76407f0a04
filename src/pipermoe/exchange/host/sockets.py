"""Messages between nodes over sockets of our own: no rendezvous, and whatever arrives first is taken first.

gloo spends three TCP messages and two thread switches on a message (about 0.6 ms of processor time on two shared
cores), and its receiver's "ready" waits in the network's queues behind everybody's data. Here a message is its bytes,
in the order that the plan gives to a pair of ranks.

Two ranks share one connection, made when a program first needs it: the lower rank connects to the higher one and greets
with its number and the group's secret. Sockets never block: a rank writes and reads all of them in turn, so that no
rank waits for another that waits for it.
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
Address = tuple[str, int]
_SIOCGIFADDR = 0x8915
_GREETING = struct.Struct("<q16s")
_EVERY_CHANGE = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET


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


class Sockets:
    """Ordered bytes to and from other ranks, and the one place where this rank sleeps."""

    def __init__(self, rank: int, secret: bytes, timeout: float):
        self.rank, self.timeout, self._secret = rank, timeout, secret
        self._listener: socket.socket | None = None
        self.addresses: list[Address] = []
        self.connections: dict[int, socket.socket] = {}
        self._peer_of: dict[int, int] = {}  # file descriptor -> rank
        self._leaving: dict[int, tuple[int, memoryview]] = {}  # peer -> message, what is left of it
        self._arriving: dict[int, deque[tuple[int, memoryview]]] = {}
        self._readable: set[int] = set()
        self._poll = select.epoll()

    def listen(self) -> None:
        """Opens this rank to the others, who need its `address`."""
        self._listener = socket.create_server((own_address(), 0), backlog=1024)
        self._listener.settimeout(self.timeout)

    @property
    def address(self) -> Address:
        assert self._listener is not None
        return self._listener.getsockname()

    def reaches(self, peer: int) -> bool:
        """Whether a connection to `peer` can be made."""
        try:
            with socket.create_connection(self.addresses[peer], timeout=self.timeout) as trial:
                trial.sendall(_GREETING.pack(-1, self._secret))
        except OSError:
            return False
        return True

    def connect(self, peers: set[int]) -> None:
        """Makes the missing connections to `peers`, each of whom does the same with this rank."""
        if peers <= self.connections.keys():
            return
        for peer in sorted(peers - self.connections.keys()):
            if peer > self.rank:
                self._call(peer)
        deadline = time.monotonic() + self.timeout
        while missing := peers - self.connections.keys():
            try:
                self._greet()
            except TimeoutError:
                deadline = 0.0
            if time.monotonic() > deadline and missing - self.connections.keys():
                raise MachineError(f"rank {self.rank}: rank {min(missing)} has not connected within {self.timeout:g} s")

    def listen_to(self, bell: int) -> None:
        """`wait` returns also when this pipe rings."""
        self._poll.register(bell, select.EPOLLIN)

    def expect(self, peer: int, message: int, into: Bytes) -> None:
        """The next bytes from `peer` belong there."""
        self._arriving.setdefault(peer, deque()).append((message, memoryview(into.data)))

    def send(self, peer: int, message: int, data: Bytes) -> bool:
        """Starts to send; whether all has left at once. If not, `data` must stay as it is until it has."""
        self._leaving[peer] = message, memoryview(data.data)
        return self._write(peer)

    def wait(self, seconds: float) -> list[int]:
        """Messages that have arrived or left, after at most `seconds` in which nothing happens."""
        done = self._read_all()
        for descriptor, _ in self._poll.poll(0.0 if done else seconds):
            peer = self._peer_of.get(descriptor)
            if peer is None:
                os.read(descriptor, 4096)  # silences the bell
                continue
            self._readable.add(peer)
            if peer in self._leaving:
                message = self._leaving[peer][0]
                done += [message] if self._write(peer) else []
        return done + self._read_all()

    def close(self) -> None:
        self._poll.close()
        for connection in self.connections.values():
            connection.close()
        if self._listener is not None:
            self._listener.close()

    def _call(self, peer: int) -> None:
        try:
            connection = socket.create_connection(self.addresses[peer], timeout=self.timeout)
            connection.sendall(_GREETING.pack(self.rank, self._secret))
        except OSError as error:
            raise MachineError(f"rank {self.rank}: connecting to rank {peer} failed: {error}") from error
        self._keep(peer, connection)

    def _greet(self) -> None:
        """Takes one caller in, if it is of this group."""
        assert self._listener is not None
        connection, _ = self._listener.accept()
        connection.settimeout(self.timeout)
        greeting = connection.recv(_GREETING.size, socket.MSG_WAITALL)
        number, secret = _GREETING.unpack(greeting) if len(greeting) == _GREETING.size else (-1, b"")
        if secret == self._secret and number >= 0:
            self._keep(number, connection)
        else:
            connection.close()

    def _keep(self, peer: int, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self.connections[peer] = connection
        self._peer_of[connection.fileno()] = peer
        self._poll.register(connection, _EVERY_CHANGE)
        self._readable.add(peer)

    def _write(self, peer: int) -> bool:
        """Writes to a peer until the socket is full; whether nothing is left."""
        message, data = self._leaving[peer]
        try:
            while data:
                data = data[self.connections[peer].send(data) :]
        except BlockingIOError:
            self._leaving[peer] = message, data
            return False
        except OSError as error:
            raise MachineError(f"rank {self.rank}: sending to rank {peer} failed: {error}") from error
        del self._leaving[peer]
        return True

    def _read_all(self) -> list[int]:
        """Reads what has come from everyone into the places that expect it."""
        done = []
        for peer in [peer for peer in self._readable if self._arriving.get(peer)]:
            queue = self._arriving[peer]
            try:
                while queue:
                    message, into = queue[0]
                    if not (count := self.connections[peer].recv_into(into)):
                        raise ConnectionError("the connection was closed")
                    queue[0] = message, into[count:]
                    if count == len(into):
                        done.append(queue.popleft()[0])
            except BlockingIOError:
                self._readable.discard(peer)
            except OSError as error:
                raise MachineError(f"rank {self.rank}: receiving from rank {peer} failed: {error}") from error
        return done

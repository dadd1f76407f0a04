"""Small messages between nodes over sockets of our own: one write, one read, no rendezvous.

gloo spends three TCP messages and two thread switches on a message (about 0.6 ms of processor time on two shared
cores); that is what an exchange of few bytes costs. Here a message is its bytes, in the order that the plan gives them.

A rank connects to a peer when it first sends to it, and greets with its number and the group's secret. A write does not
wait for its reader as long as what a pair exchanges fits into the socket's buffers (`CAPACITY`; larger pairs go through
the process group): a rank enters the next exchange only after it has read all of this one, so buffers never hold more
than that of one exchange on which anyone still waits.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys

import numpy as np
from numpy.typing import NDArray

from pipermoe.specs.errors import MachineError

Bytes = NDArray[np.uint8]
CAPACITY = 1 << 16  # bytes from one rank to one other in one exchange
_BUFFER = 4 * CAPACITY
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


class Wire:
    """Ordered bytes to and from every other rank."""

    def __init__(self, rank: int, secret: bytes, timeout: float):
        self.rank, self.secret, self.timeout = rank, secret, timeout
        self.listener = socket.create_server((own_address(), 0), backlog=1024)
        self.listener.settimeout(timeout)
        self.address = self.listener.getsockname()
        self.peers: list[tuple[str, int]] = []
        self._to: dict[int, socket.socket] = {}
        self._from: dict[int, socket.socket] = {}

    def reaches(self, addresses: list[tuple[str, int]]) -> bool:
        """Whether the next rank can be connected to; remembers the addresses of all."""
        self.peers = addresses
        try:
            self._connection_to((self.rank + 1) % len(addresses))
        except OSError:
            return False
        return True

    def send(self, peer: int, data: Bytes) -> None:
        try:
            self._connection_to(peer).sendall(memoryview(data.data))
        except OSError as error:
            raise MachineError(f"rank {self.rank}: sending to rank {peer} failed: {error}") from error

    def receive(self, peer: int, into: Bytes) -> None:
        """Fills `into` with the next bytes from `peer`."""
        try:
            _fill(self._connection_from(peer), memoryview(into.data))
        except OSError as error:
            reason = (
                f"nothing within {self.timeout:g} s" if isinstance(error, (TimeoutError, BlockingIOError)) else error
            )
            raise MachineError(f"rank {self.rank}: receiving from rank {peer} failed: {reason}") from error

    def close(self) -> None:
        for connection in (self.listener, *self._to.values(), *self._from.values()):
            connection.close()

    def _connection_to(self, peer: int) -> socket.socket:
        if peer not in self._to:
            connection = socket.create_connection(self.peers[peer], timeout=self.timeout)
            self._configure(connection)
            connection.sendall(_GREETING.pack(self.rank, self.secret))
            self._to[peer] = connection
        return self._to[peer]

    def _connection_from(self, peer: int) -> socket.socket:
        while peer not in self._from:
            connection, _ = self.listener.accept()
            self._configure(connection)
            greeting = bytearray(_GREETING.size)
            _fill(connection, memoryview(greeting))
            number, secret = _GREETING.unpack(greeting)
            if secret == self.secret:
                self._from[number] = connection
            else:
                connection.close()  # not of this group
        return self._from[peer]

    def _configure(self, connection: socket.socket) -> None:
        """Blocking with a limit in the kernel, which saves the poll before every call."""
        seconds = int(self.timeout)
        limit = struct.pack("ll", seconds, int((self.timeout - seconds) * 1e6))
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            connection.setsockopt(socket.SOL_SOCKET, option, limit)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER)


def _fill(connection: socket.socket, into: memoryview) -> None:
    while len(into):
        count = connection.recv_into(into, len(into), socket.MSG_WAITALL)
        if not count:
            raise ConnectionError("the connection was closed")
        into = into[count:]

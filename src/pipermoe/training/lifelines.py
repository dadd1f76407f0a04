"""Lifelines: a connection of every rank with the first, which the system closes when a process ends, however it ends.

So death has evidence, and no process is taken for dead because it is slow. Where a connection cannot be made there is
none, and nothing is known of that rank.
"""

from __future__ import annotations

import secrets
import socket
import struct
import time
from contextlib import suppress
from selectors import EVENT_READ, DefaultSelector

CONNECT_SECONDS = 2.0  # in which the one that connects gives no sign of life
_GOODBYE = b"."
_GREETING = struct.Struct(">i32s")  # rank, the listener's secret


class Lifelines:
    """One rank's ends: the first rank listens (`listen`) and holds one for each of the others, who hold one each."""

    def __init__(self) -> None:
        self._ends = DefaultSelector()
        self._closed_at: dict[int, float] = {}

    def listen(self, ranks: int) -> tuple[int, str]:
        """Accept the others from now on; returns the port, and the secret that they greet with."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", 0), family=family, backlog=ranks, dualstack_ipv6=both)
        server.setblocking(False)
        self._ends.register(server, EVENT_READ)
        self._secret = secrets.token_hex(16)
        return server.getsockname()[1], self._secret

    def connect(self, rank: int, host: str, port: int, secret: str) -> None:
        """Tie rank `rank` to the first, which listens there and has this secret."""
        with suppress(OSError):
            end = socket.create_connection((host, port), CONNECT_SECONDS)
            end.sendall(_GREETING.pack(rank, secret.encode()))
            self._ends.register(end, EVENT_READ, data=0)

    def ended(self, for_seconds: float = 0.0) -> list[int]:
        """The ranks whose processes have ended without a goodbye, at least so long ago."""
        for key, _ in self._ends.select(0):
            end = key.fileobj
            assert isinstance(end, socket.socket)
            if key.data is None:
                with suppress(BlockingIOError):  # once all that have called are in
                    while True:
                        self._welcome(end.accept()[0])
                continue
            if _closed_without_goodbye(end):
                self._closed_at[key.data] = time.monotonic()
            self._ends.unregister(end)
            end.close()
        return [rank for rank, moment in self._closed_at.items() if time.monotonic() - moment >= for_seconds]

    def close(self) -> None:
        """Part from the others, which do not take this for an end."""
        for key in list(self._ends.get_map().values()):
            end = key.fileobj
            assert isinstance(end, socket.socket)
            if key.data is not None:
                with suppress(OSError):
                    end.sendall(_GOODBYE)
            end.close()
        self._ends.close()

    def _welcome(self, end: socket.socket) -> None:
        end.settimeout(CONNECT_SECONDS)
        with suppress(OSError):
            greeting = end.recv(_GREETING.size)
            rank, secret = _GREETING.unpack(greeting) if len(greeting) == _GREETING.size else (0, b"")
            if secret == self._secret.encode():
                self._ends.register(end, EVENT_READ, data=rank)
                return
        end.close()  # a stranger


def _closed_without_goodbye(end: socket.socket) -> bool:
    try:
        return end.recv(1) != _GOODBYE
    except OSError:  # reset
        return True

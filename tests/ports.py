"""Ports for programs that want a number before they listen: nobody else is given them in between."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator

LOWEST, HIGHEST = 10_000, 32_000  # below those that the system gives to who asks for any, as gloo does all the time
RANGE = 20  # ports that a test process looks at first, so that several running tests do not meet


def free_ports(count: int) -> list[int]:
    """Different ports of this host that nobody listens to."""
    first = LOWEST + os.getpid() * RANGE % (HIGHEST - LOWEST)
    return list(itertools.islice(_free_from(first), count))


def _free_from(first: int) -> Iterator[int]:
    for port in itertools.chain(range(first, HIGHEST), range(LOWEST, first)):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port

"""Ctrl-C and SIGTERM for a rank that others started: it ends at once, also while it waits inside a collective."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

from pipermoe.processes.progress import show_cursor

ENDING = (signal.SIGINT, signal.SIGTERM)


def end_on_signals(*, say: bool, last_words: Callable[[], str] = str) -> None:
    """From now on these signals end this process with 128 + their number; `say`: with a line on stderr.

    `last_words` are asked for on SIGTERM, with which a launcher ends the ranks that a failed one has left behind, and
    said whatever `say` is.

    Python runs signal handlers between its own instructions, so not while C++ waits for another rank; the wake-up file
    descriptor is written to at once. Call it in the main thread.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in ENDING:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer)
    threading.Thread(target=_end, args=(reader, say, last_words), name="signals", daemon=True).start()


def _end(reader: int, say: bool, last_words: Callable[[], str]) -> None:
    while (number := os.read(reader, 1)[0]) not in ENDING:
        pass
    line = last_words() if number == signal.SIGTERM else ""
    if say or line:
        show_cursor()
        line = line or ("interrupted" if number == signal.SIGINT else "terminated")
        print(f"pipermoe: {line}", file=sys.stderr, flush=True)
    os._exit(128 + number)

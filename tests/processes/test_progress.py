"""Bars and status lines: on a terminal while something happens, and nowhere else."""

from __future__ import annotations

import os
import pty
import re
import sys

from pipermoe.processes.progress import Display


def show() -> None:
    display = Display()
    with display.activity("training", 3) as done:
        done(2)
        with display.activity("saving"):
            pass


def test_a_terminal_sees_what_happens_and_is_left_clean(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    child, terminal = pty.fork()
    if child == 0:
        sys.stderr = os.fdopen(2, "w", closefd=False)  # the terminal instead of what captures a test's output
        show()
        os._exit(0)
    shown = b""
    while piece := _read(terminal):
        shown += piece
    os.waitpid(child, 0)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip() for line in re.split(r"[\r\n]", shown.decode())]
    assert any(re.fullmatch(r"training .* 2/3 .*", line) for line in lines)
    assert "saving" in lines  # no bar where the total is not known
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")  # the cursor is back


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that the other end is closed
        return b""


def test_a_pipe_sees_nothing(capfd):
    show()
    assert capfd.readouterr() == ("", "")

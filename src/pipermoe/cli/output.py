"""Where results and remarks go: results to stdout, as JSON alone when asked for; remarks beside them."""

from __future__ import annotations

import os
from collections.abc import Callable

from pydantic import BaseModel
from rich.console import Console

from pipermoe.specs.documents import to_json

WIDTH = 100


def terminal() -> Console:
    """The terminal, or 100 columns where there is none, so that a table in a file is whole."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDTH)


def show(result: BaseModel, render: Callable[[Console], None], *, as_json: bool) -> None:
    """The result on stdout, as JSON or for people."""
    if as_json:
        print(to_json(result))
    else:
        render(terminal())


def note(message: str, *, as_json: bool) -> None:
    """A remark for people; on stderr when stdout carries JSON."""
    Console(stderr=as_json).print(message, highlight=False, soft_wrap=True)

"""The command line: one file per command. Thin: each parses, calls one function and prints its result."""

from __future__ import annotations

import sys
from typing import NoReturn


def main(arguments: list[str] | None = None) -> NoReturn:
    """The command `pipermoe`. Nothing is imported before Ctrl-C is answered as at any later moment."""
    try:
        from pipermoe.cli.app import run

        code = run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("pipermoe: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)

"""The command line: one file per command. Thin: each parses, calls one function and prints its result."""

from pipermoe.cli.app import main

__all__ = ["main"]

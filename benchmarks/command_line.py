"""The command line of a benchmark: what it says of itself as help, and `--json FILE` for what it found."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path


def parser_of(description: str | None) -> ArgumentParser:
    """A parser with the option that every benchmark has."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found, too")
    return parser


def write_json(options: Namespace, found: object) -> None:
    """Write what was found where `--json` says, if it was given."""
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

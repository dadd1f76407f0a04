"""How Megatron writes lists: runs of layers in a list expression, and stages in a pipeline layout."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from pipermoe.specs.errors import UserError, describe_value

LONGEST = 1000  # characters of an expression or layout; a model has no more stages than fit


def write_flags(values: Sequence[int]) -> str:
    """`([0]*3+[1]*58)`: zeros and ones by runs."""
    runs = ((value, len(list(run))) for value, run in groupby(values))
    return f"({'+'.join(f'[{value}]*{length}' if length > 1 else f'[{value}]' for value, length in runs)})"


def read_flags(text: str, length: int, flag: str, *, first: int) -> list[int]:
    """The `length` zeros and ones of a list expression, or of the integer N: ones at `first`, `first` + N, ..."""
    rule = f"must be a number of layers or a list expression such as ([0]*1+[1]*{length - 1}) of {length} layers"
    try:
        node = ast.parse(text[:LONGEST], mode="eval").body
        if isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value > 0:
            return [int(layer % node.value == first % node.value) for layer in range(length)]
        values = _evaluate(node, length)
    except (SyntaxError, ValueError, RecursionError):
        values = []
    if len(values) != length:
        raise UserError(describe_value("", flag, text, rule))
    return values


def _evaluate(node: ast.expr, most: int) -> list[int]:
    """The list that `[0]*3+[1]*58` means; ValueError for anything but sums and multiples of at most `most` items."""
    match node:
        case ast.List(elts=items):
            values = [item.value for item in items if isinstance(item, ast.Constant) and item.value in (0, 1)]
            if len(values) == len(items):
                return values  # type: ignore[return-value]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _evaluate(left, most) + _evaluate(right, most)
        case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int(times))) if times <= most:
            return _evaluate(left, most) * times
    raise ValueError("not a list of zeros and ones")


@dataclass(frozen=True, slots=True)
class Layout:
    """Decoder layers and multi-token prediction layers of every stage, in the order of the model."""

    decoder: tuple[int, ...]
    mtp: tuple[int, ...]

    def __str__(self) -> str:
        """`Et*6|t*6|t*6|t*6L`: E embedding, t decoder layer, m prediction layer, L loss."""
        stages = [_repeated("t", t) + _repeated("m", m) for t, m in zip(self.decoder, self.mtp, strict=True)]
        stages[0] = "E" + stages[0]
        stages[-1] += "L"
        return "|".join(stages)


def read_layout(text: str) -> Layout:
    """The stages of a `--pipeline-model-parallel-layout`. UserError for what is not one."""
    expanded = text[:LONGEST].replace(",", "").replace(" ", "")
    expanded = re.sub(r"\(([^()]*)\)\*(\d{1,4})", lambda group: group[1] * int(group[2]), expanded)
    expanded = re.sub(r"([EtmL|])\*(\d{1,4})", lambda item: item[1] * int(item[2]), expanded)
    whole = expanded.replace("|", "")
    if not re.fullmatch(r"Et*m*L", whole):
        rule = "must be stages of E, t, m, L between |, for example Et*6|t*6|t*6|t*6L"
        raise UserError(describe_value("", "--pipeline-model-parallel-layout", text, rule))
    stages = expanded.split("|")
    return Layout(tuple(stage.count("t") for stage in stages), tuple(stage.count("m") for stage in stages))


def _repeated(letter: str, count: int) -> str:
    return letter if count == 1 else f"{letter}*{count}" if count else ""

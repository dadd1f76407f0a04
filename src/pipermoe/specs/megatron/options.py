"""The options of Megatron-LM's parser, frozen: names, types, choices, defaults.

options.tsv lists what `megatron.training.arguments` of megatron-core 0.19.2 registers, which tests/export checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

VERSION = "0.19.2"

Value = bool | int | float | str | list[Any] | None


@dataclass(frozen=True, slots=True)
class Option:
    """One option. `name` is its key in Megatron's namespace; an "on" or "off" option takes no value and sets it."""

    flag: str
    name: str
    kind: Literal["on", "off", "int", "float", "str"]
    many: bool
    default: Value
    choices: tuple[str, ...]

    @property
    def takes_value(self) -> bool:
        return self.kind not in ("on", "off")

    def convert(self, word: str) -> bool | int | float | str:
        """`word` as a value of this option; ValueError says what is accepted."""
        if self.choices and word not in self.choices:
            raise ValueError(f"accepted: {', '.join(self.choices)}")
        if self.kind in ("on", "off"):
            return word == "True"
        try:
            return {"int": int, "float": float, "str": str}[self.kind](word)
        except ValueError:
            raise ValueError(f"must be {'an integer' if self.kind == 'int' else 'a number'}") from None


@cache
def options() -> dict[str, Option]:
    """Every option by its flag."""
    text = (resources.files("pipermoe.specs.megatron") / "options.tsv").read_text(encoding="utf-8")
    return {option.flag: option for option in map(_parse, text.splitlines()[1:])}


@cache
def defaults() -> dict[str, Value]:
    """Megatron's default of every key of its namespace."""
    return {option.name: option.default for option in options().values()}


@cache
def flags(name: str) -> tuple[Option, ...]:
    """The options that set the key `name`."""
    return tuple(option for option in options().values() if option.name == name)


def _parse(line: str) -> Option:
    flag, kind, default, choices, name = (line.split("\t") + [""] * 4)[:5]
    many = kind.endswith("+")
    option = Option(
        flag=flag,
        name=name or flag.removeprefix("--").replace("-", "_"),
        kind=kind.removesuffix("+"),  # type: ignore[arg-type]
        many=many,
        default=None,
        choices=tuple(filter(None, choices.split(","))),
    )
    value = option.convert(default) if default else None
    return Option(flag, option.name, option.kind, many, [value] if many and default else value, option.choices)

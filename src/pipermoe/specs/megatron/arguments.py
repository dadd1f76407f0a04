"""Arguments: a Megatron-LM command line as a mapping, with Megatron's defaults behind what is given."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipermoe.specs.errors import UserError, describe_value
from pipermoe.specs.megatron.options import VERSION, Option, Value, defaults, flags, options


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a command line gives, keyed as in Megatron's namespace (`num_layers`); other keys have their defaults."""

    given: Mapping[str, Value]

    def __getitem__(self, name: str) -> Any:
        return self.given[name] if name in self.given else defaults()[name]

    def __contains__(self, name: str) -> bool:
        return name in self.given

    @staticmethod
    def parse(words: Sequence[str]) -> Arguments:
        """The arguments in `words`, as a shell would split them. UserError for an option that Megatron refuses."""
        given: dict[str, Value] = {}
        for flag, values in _options_with_values(words):
            option = options().get(flag)
            if option is None:
                close = difflib.get_close_matches(flag, options(), n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise UserError(f"{flag}: Megatron-LM {VERSION} has no such option{hint}")
            given[option.name] = _value(option, values)
        return Arguments(given)

    @staticmethod
    def of(mapping: Mapping[str, object]) -> Arguments:
        """The arguments of a mapping such as a recipe in YAML has: keys with or without dashes, switches true."""
        words = []
        for key, value in mapping.items():
            flag = "--" + key.removeprefix("--").replace("_", "-")
            text = value.strip("\"'") if isinstance(value, str) else value
            if text is True or text in ("true", "True"):  # not `in (True, ...)`: 1 is equal to it
                words.append(flag)
            elif text is not False and text not in (None, "false", "False"):
                option = options().get(flag)
                many = option is not None and option.many
                words += [flag, *(str(text).strip("[]").replace(",", " ").split() if many else [str(text)])]
        return Arguments.parse(words)

    def words(self) -> list[list[str]]:
        """The command line, one list of words per option, in the order given. What is None is left out."""
        return [words for name, value in self.given.items() if (words := _words(name, value))]

    def __str__(self) -> str:
        return " ".join(" ".join(words) for words in self.words())


def _options_with_values(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(flag, its values): a value is any word that does not start an option; `--flag=value` is split."""
    flag, values = "", []
    for word in words:
        if word.startswith("--"):
            if flag:
                yield flag, values
            flag, equals, value = word.partition("=")
            values = [value] if equals else []
        elif flag:
            values.append(word)
        else:
            raise UserError(f"{word!r}: an option such as --num-layers must come first")
    if flag:
        yield flag, values


def _value(option: Option, words: list[str]) -> Value:
    if not option.takes_value:
        if words:
            raise UserError(f"{option.flag}: takes no value, got {' '.join(words)!r}")
        return option.kind == "on"
    if not words or (len(words) > 1 and not option.many):
        count = "one value" if not option.many else "a value"
        raise UserError(f"{option.flag}: takes {count}, got {' '.join(words)!r}")
    try:
        values = [option.convert(word) for word in words]
    except ValueError as error:
        raise UserError(describe_value("", option.flag, " ".join(words), str(error))) from None
    return values if option.many else values[0]  # type: ignore[return-value]


def _words(name: str, value: Value) -> list[str]:
    candidates = flags(name)
    if isinstance(value, bool):
        switch = next((option for option in candidates if option.kind == ("on" if value else "off")), None)
        return [switch.flag] if switch else []  # a switch without an opposite is off when it is not there
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [candidates[0].flag, *map(str, values)]

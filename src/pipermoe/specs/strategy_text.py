"""A strategy in one line, as people write it: `pp8 dp32 ep32 mbs1 1f1b z1`. Nothing is lost on the way and back."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from pydantic import ValidationError

from pipermoe.specs.documents import load_mapping, validate
from pipermoe.specs.errors import UserError
from pipermoe.specs.strategy import RECOMPUTE_MODULES, Strategy
from pipermoe.specs.strategy_table import DISPATCHER_NAMES, EXCHANGE_NAMES, RANK_ORDERS, SCHEDULE_NAMES

DEGREES = {
    "pp": "pipeline_parallel",
    "vpp": "virtual_stages",
    "dp": "data_parallel",
    "cp": "context_parallel",
    "tp": "tensor_parallel",
    "ep": "expert_parallel",
    "edp": "expert_data_parallel",
    "etp": "expert_tensor_parallel",
    "mbs": "micro_batch_size",
}
ACCEPTED = (
    f"a degree ({', '.join(f'{short}N' for short in DEGREES)}), z0 to z3 or z1/0 (dense/expert), deduplicated, "
    f"deduplicated:N (once for every N ranks), planned, {', '.join(RANK_ORDERS)}, full, "
    f"selective:MODULE,... ({', '.join(RECOMPUTE_MODULES)}), "
    f"split:N,N,... (SxN: S stages of N layers) or a schedule ({', '.join(SCHEDULE_NAMES)})"
)
_DEGREE, _ZERO = re.compile(r"([a-z]+)(\d+)"), re.compile(r"z([0-3])(?:/([0-3]))?")
_STAGES = r"(?:([1-9]\d{0,4})x)?([1-9]\d{0,5})"
_LONG_RUN = 4  # stages of equally many layers that are written as one


def strategy_text(strategy: Strategy) -> str:
    """All of `strategy` in one line that `parse_strategy` reads back; what has its default value is left out."""
    words = [*_degrees(strategy), word(strategy, "micro_batch_size"), strategy.schedule, word(strategy, "zero_dense")]
    plain, options = Strategy(), ("rank_order", "dispatcher", "exchange", "recompute", "layer_split")
    return " ".join(
        [*words, *(word(strategy, key) for key in options if getattr(strategy, key) != getattr(plain, key))]
    )


def layout_text(strategy: Strategy) -> str:
    """`Strategy.compact`: degrees and ZeRO level."""
    return " ".join([*_degrees(strategy), word(strategy, "zero_dense")])


def _degrees(strategy: Strategy) -> list[str]:
    """Degrees of one are left out, except pp, dp and ep."""
    always = {DEGREES[short] for short in ("pp", "dp", "ep")}
    keys = [key for key in DEGREES.values() if key != "micro_batch_size"]
    return [word(strategy, key) for key in keys if getattr(strategy, key) > 1 or key in always]


SHORT = {key: short for short, key in DEGREES.items()}


def word(strategy: Strategy, key: str) -> str:
    """How `strategy` says one of its fields: `pp8`, `z1/0`, `selective:norm`; also a default, as `split:even`."""
    if key in SHORT:
        return f"{SHORT[key]}{getattr(strategy, key)}"
    if key in ("zero_dense", "zero_expert"):
        dense, expert = strategy.zero_dense, strategy.zero_expert
        return f"z{dense}" if dense == expert else f"z{dense}/{expert}"
    if key in ("recompute", "recompute_modules"):
        modules = ",".join(strategy.recompute_modules)
        return f"{strategy.recompute}:{modules}" if modules else f"{strategy.recompute}"
    if key in ("dispatcher", "ranks_per_copy"):
        once = strategy.ranks_per_copy
        return f"{strategy.dispatcher}:{once}" if once > 1 else strategy.dispatcher
    if key == "layer_split":
        return f"split:{_split_text(strategy.layer_split) or 'even'}"
    return str(getattr(strategy, key))


def _split_text(split: Sequence[int]) -> str:
    """`1,29x2,1`: the layers of each stage, long runs of equal stages as one."""
    runs = [(layers, len(list(run))) for layers, run in groupby(split)]
    parts = ([f"{count}x{layers}"] if count >= _LONG_RUN else [str(layers)] * count for layers, count in runs)
    return ",".join(part for each in parts for part in each)


def _split_of(text: str) -> tuple[int, ...]:
    runs = re.findall(_STAGES, text)
    return tuple(int(layers) for count, layers in runs for _ in range(int(count or 1)))


def read_strategy(reference: str) -> Strategy:
    """The strategy that `reference` names: a .toml or .json file (of a strategy or a plan), or a line. `UserError`."""
    if not reference.endswith((".toml", ".json")):
        return parse_strategy(reference)
    data = load_mapping(reference)
    return validate(data.get("strategy", data), Strategy, where=reference)


def parse_strategy(text: str) -> Strategy:
    """The strategy that `text` or `Strategy.compact()` says: words in any order, each at most once.

    Without `edp` it is what the other degrees leave: dp * cp * tp / (ep * etp). Raises `UserError` naming the word.
    """
    values: dict[str, Any] = {}
    for word in text.split():
        for key, value in _meaning(word):
            if key in values:
                raise UserError(f"strategy {text!r}: {word}: {key} is given twice")
            values[key] = value
    if not values:
        raise UserError(f"strategy {text!r}: must name {ACCEPTED}")
    if "expert_data_parallel" not in values:
        dense, expert = _product(values, "dp", "cp", "tp"), _product(values, "ep", "etp")
        values["expert_data_parallel"] = max(1, dense // expert)
    try:
        return Strategy(**values)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"strategy {text!r}: {message}") from None


def _meaning(word: str) -> Iterator[tuple[str, Any]]:
    """(field, value) pairs that one word sets."""
    name, _, values = word.partition(":")
    if match := _ZERO.fullmatch(word):
        yield "zero_dense", int(match[1])
        yield "zero_expert", int(match[2] or match[1])
    elif word in SCHEDULE_NAMES:
        yield "schedule", word
    elif word in DISPATCHER_NAMES:
        yield "dispatcher", word
    elif name == "deduplicated" and re.fullmatch(r"[1-9]\d{0,8}", values):
        yield "dispatcher", name
        yield "ranks_per_copy", int(values)
    elif word in EXCHANGE_NAMES:
        yield "exchange", word
    elif word in RANK_ORDERS:
        yield "rank_order", word
    elif (match := _DEGREE.fullmatch(word)) and match[1] in DEGREES and 0 < int(match[2]) < 2**31:
        yield DEGREES[match[1]], int(match[2])
    elif word in ("full", "selective") or (name == "selective" and values):
        yield "recompute", name
        yield "recompute_modules", tuple(filter(None, values.split(",")))
    elif name == "split" and re.fullmatch(f"{_STAGES}(,{_STAGES})*", values):
        yield "layer_split", _split_of(values)
    else:
        close = difflib.get_close_matches(word, SCHEDULE_NAMES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"strategy: {word!r} is no word of a strategy; {hint}accepted: {ACCEPTED}")


def _product(values: dict[str, Any], *names: str) -> int:
    product = 1
    for name in names:
        product *= values.get(DEGREES[name], 1)
    return product

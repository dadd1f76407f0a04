"""Routing given as data: how many rows each rank of an expert-parallel group sends to each expert.

P source ranks, E experts, T tokens of a micro-batch on one rank, K choices a token; counts[source][expert], each row
sums to T * K. No expert gets more than T from one source: a token's choices are different experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipermoe.resources.dispatch import balanced
from pipermoe.specs.documents import read_mapping
from pipermoe.specs.errors import UserError, describe_value

ACCEPTED = "accepted: balanced, lognormal:max=1.5, lognormal:sigma=0.5, or a JSON file"


def planned_counts(routing: str, *, tokens: int, top_k: int, experts: int, sources: int, seed: int = 0) -> NDArray:
    """The counts (P, E) that `routing` describes: "balanced", "lognormal:max=1.5", "lognormal:sigma=0.5" or a file.

    Log-normal: the popularity of an expert is exp(sigma * z) with z drawn from a standard normal by `seed`, the same
    for all sources; `max` is the load of the most popular expert over the mean, from which sigma follows. A file
    holds {"shares": [E numbers]}, a histogram of any total, or {"counts": [P rows of E whole numbers]}.
    Raises `UserError`.
    """
    rows = tokens * top_k
    if routing == "balanced":
        return balanced(rows, experts, sources)
    if routing.endswith(".json"):
        return _from_file(Path(routing), tokens=tokens, top_k=top_k, experts=experts, sources=sources)
    name, _, parameter = routing.partition(":")
    key, _, text = parameter.partition("=")
    if name != "lognormal" or key not in ("max", "sigma"):
        raise UserError(describe_value("", "--routing", routing, ACCEPTED))
    try:
        value = float(text)
    except ValueError:
        raise UserError(describe_value("", "--routing", routing, f"{text!r} is not a number; {ACCEPTED}")) from None
    normal_E = np.random.default_rng(seed).standard_normal(experts)
    if key == "max":
        most = experts / top_k
        if not 1 <= value <= most:
            rule = f"max must be between 1 and num_experts / top_k = {most:g}, where every token chooses the same"
            raise UserError(describe_value("", "--routing", routing, rule))
        shares_E = lognormal_of_maximum(normal_E, value)
    elif 0 <= value <= 20:
        shares_E = np.exp(value * (normal_E - normal_E.max()))
    else:
        raise UserError(describe_value("", "--routing", routing, "sigma must be between 0 and 20"))
    return np.tile(apportion(shares_E, rows, tokens), (sources, 1))


def lognormal_of_maximum(normal_E: NDArray, maximum: float) -> NDArray:
    """exp(sigma * normal) whose largest is `maximum` times the mean (at most E), by bisection over sigma."""
    below_E = normal_E - normal_E.max()
    low, high = 0.0, 1.0
    while 1 / np.exp(high * below_E).mean() < maximum and high < 1e6:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 / np.exp(middle * below_E).mean() < maximum else (low, middle)
    return np.exp(high * below_E)


def apportion(shares_E: NDArray, rows: int, tokens: int) -> NDArray:
    """Whole rows in proportion to `shares_E` by largest remainders; what exceeds `tokens` goes to the other experts."""
    open_E = np.ones(len(shares_E), dtype=bool)
    exact_E = np.full(len(shares_E), float(tokens))
    while open_E.any():
        left = rows - tokens * np.count_nonzero(~open_E)
        weights_E = np.where(open_E, np.maximum(shares_E, np.finfo(float).tiny), 0.0)
        exact_E = np.where(open_E, left * weights_E / weights_E.sum(), tokens)
        over_E = open_E & (exact_E > tokens)
        if not over_E.any():
            break
        open_E &= ~over_E
    counts_E = np.floor(exact_E).astype(np.int64)
    room_E = np.where(counts_E < tokens, exact_E - counts_E, -1.0)
    counts_E[np.argsort(-room_E, kind="stable")[: rows - counts_E.sum()]] += 1
    return counts_E


def _from_file(path: Path, *, tokens: int, top_k: int, experts: int, sources: int) -> NDArray:
    document, rows = read_mapping(path), tokens * top_k
    if len(document) != 1 or not set(document) <= {"shares", "counts"}:
        raise UserError(f'{path}: must hold one key, "shares" or "counts"')
    ((key, value),) = document.items()
    if key == "shares":
        shares_E = _numbers(path, key, value, experts, f"one share for each of the {experts} experts")
        if shares_E.sum() <= 0:
            raise UserError(f"{path}: shares: must not all be zero")
        return np.tile(apportion(shares_E, rows, tokens), (sources, 1))
    if not isinstance(value, list) or len(value) != sources:
        found = len(value) if isinstance(value, list) else type(value).__name__
        raise UserError(f"{path}: counts: must have a row for each of the {sources} expert-parallel ranks, not {found}")
    counts_PE = np.stack([_row(path, source, row, tokens, top_k, experts) for source, row in enumerate(value)])
    return counts_PE


def _row(path: Path, source: int, row: Any, tokens: int, top_k: int, experts: int) -> NDArray:
    key, rows = f"counts[{source}]", tokens * top_k
    numbers_E = _numbers(path, key, row, experts, f"one count for each of the {experts} experts")
    counts_E = numbers_E.astype(np.int64)
    if (counts_E != numbers_E).any():
        raise UserError(f"{path}: {key}: must hold whole numbers")
    if counts_E.sum() != rows:
        raise UserError(
            f"{path}: {key} sums to {counts_E.sum()}: must be micro_batch_size * seq_len * top_k = {tokens} * {top_k} "
            f'= {rows}; give "shares" to have them scaled'
        )
    if (most := counts_E.max()) > tokens:
        expert = int(counts_E.argmax())
        raise UserError(f"{path}: {key}[{expert}] = {most}: must be at most the {tokens} tokens, which choose it once")
    return counts_E


def _numbers(path: Path, key: str, value: Any, length: int, meaning: str) -> NDArray:
    """A list of `length` finite numbers, none negative."""
    if not isinstance(value, list) or len(value) != length:
        found = f"{len(value)} of them" if isinstance(value, list) else f"a {type(value).__name__}"
        raise UserError(f"{path}: {key}: must be a list with {meaning}, not {found}")
    if not all(type(number) in (int, float) and 0 <= number < float("inf") for number in value):
        raise UserError(f"{path}: {key}: must hold numbers of at least 0")
    return np.array(value, dtype=float)

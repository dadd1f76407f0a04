"""Errors that a user can act on: one clear message, an exit code, never a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Wrong input. The message names file, key, value and what is accepted; the command exits with 2."""

    exit_code = 2


class NoPlanFits(UserError):
    """The input is legal, but no strategy fits the machine; the command exits with 3."""

    exit_code = 3


class MachineError(UserError):
    """The machine or a measurement on it failed (a rank died, a link is missing); the command exits with 4."""

    exit_code = 4


def describe_value(where: str, key: str, value: object, rule: str) -> str:
    """`plan.toml: strategy.expert_parallel = 12: must divide num_experts = 128; nearest: 8, 16`."""
    prefix = f"{where}: " if where else ""
    return f"{prefix}{key} = {value!r}: {rule}" if key else f"{prefix}{rule}"


def either(names: Sequence[str]) -> str:
    """`a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def nearest_divisors(value: int, total: int, count: int = 2) -> list[int]:
    """The divisors of `total` nearest to `value`, in ascending order: the way out named by divisibility errors."""
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    return sorted(sorted(divisors, key=lambda d: (abs(d - value), d))[:count])

"""All-to-all as data: plans, their cost, their simulation, and (with torch) their execution.

Importing this package does not import torch; the names below that need it do, when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipermoe.exchange.executor import (
        Exchange,
        Handle,
        all_to_all,
        all_to_all_single,
        combine,
        dispatch,
        dispatch_weights,
        exchange_of,
    )

__all__ = [
    "Exchange",
    "Handle",
    "all_to_all",
    "all_to_all_single",
    "combine",
    "dispatch",
    "dispatch_weights",
    "exchange_of",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipermoe.exchange import executor

    return getattr(executor, name)

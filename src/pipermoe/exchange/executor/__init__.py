"""Runs exchange plans on tensors of a process group: the third reader of an ExchangePlan, the only one with torch."""

from pipermoe.exchange.executor.autograd import all_to_all
from pipermoe.exchange.executor.dispatch import combine, dispatch, dispatch_weights
from pipermoe.exchange.executor.drop_in import all_to_all_single, exchange_of
from pipermoe.exchange.executor.exchange import Exchange, Handle

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

"""Carries a group's all-to-alls by exchange plans instead of torch's collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from pipermoe.exchange import all_to_all_single, exchange_of
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.pipeline.flight import Work


class PlannedExchange:
    """A `Transport`: for every matrix of bytes the plan that is predicted, or known, to be fastest.

    Ranks tell each other their rows in the background, where the plan is made and run as well. Making one is a
    collective call.
    """

    def __init__(self, group: dist.ProcessGroup, meter: Meter):
        self._group, self._meter = group, meter
        self._exchange = exchange_of(group)

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_rows: Sequence[int] | None, sent_rows: Sequence[int] | None
    ) -> Work:
        self._meter.exchanged(self._group, sent, sent_rows)
        work = all_to_all_single(received, sent, received_rows, sent_rows, async_op=True, exchange=self._exchange)
        assert work is not None
        return work

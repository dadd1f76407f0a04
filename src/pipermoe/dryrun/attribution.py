"""Counters that also say where: FLOPs by action and module, traffic by action."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from pipermoe.runtime.counters import FlopCounter, TrafficCounter
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.optimizer.flat_parameters import FlatParameters
from pipermoe.schedule.action import Action
from pipermoe.specs.report import Traffic

ATTENTION_CORE = "attention_core"


class AttributedFlops(FlopCounter):
    """FLOPs by action, and by the module whose weights or weight gradients a product touches.

    Every parameter is a view of a flat buffer, so the place of an operand in its storage names the module: in forward,
    recomputation, backward and deferred weight gradients alike. Products that touch no parameter are those of queries,
    keys and values: the attention core. The buffers of sharded layers come and go, so they are looked up every time.
    """

    def __init__(self, meter: Meter, flats: Iterable[FlatParameters]):
        super().__init__()
        self._meter = meter
        self._layouts = [
            (flat, [span.start for span in flat.spans], [module_of(span.name) for span in flat.spans]) for flat in flats
        ]
        self.by_action: dict[Action | str, int] = defaultdict(int)
        self.by_module: dict[str, int] = defaultdict(int)

    def add(self, flops: int, operands: Any) -> None:
        super().add(flops, operands)
        self.by_action[self._meter.action] += flops
        self.by_module[self._module(operands)] += flops

    def _module(self, operands: Any) -> str:
        for operand in operands:
            if not isinstance(operand, Tensor):
                continue
            storage = operand.untyped_storage()
            for flat, starts, modules in self._layouts:
                if any(storage is buffer.untyped_storage() for buffer in flat.whole_buffers):
                    return modules[bisect_right(starts, operand.storage_offset()) - 1]
        return ATTENTION_CORE


def module_of(name: str) -> str:
    """`layers.7.experts.gate_up.weight` -> "experts"; tied word embeddings multiply in the head only."""
    parts = name.split(".")
    part = parts[2] if parts[0] == "layers" else parts[0]
    return "head" if part == "embedding" else part


class AttributedTraffic(TrafficCounter):
    """Calls and bytes of each collective by action."""

    def __init__(self, meter: Meter):
        super().__init__()
        self._meter = meter
        self._by_action: dict[Action | str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))

    def add(self, key: str, sent_bytes: int) -> None:
        super().add(key, sent_bytes)
        total = self._by_action[self._meter.action][key]
        total[0] += 1
        total[1] += sent_bytes

    def of(self, action: Action | str) -> dict[str, Traffic]:
        found = self._by_action.get(action, {})
        return {key: Traffic(calls=calls, bytes=size) for key, (calls, size) in sorted(found.items())}

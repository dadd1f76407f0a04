"""What a step really uses: peak bytes by category, executed FLOPs, bytes given to the network.

Three counters that see every operation of the block they wrap, real or under FakeTensorMode. A trainer wraps one step
in them and runs all others at full speed.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from pipermoe.runtime.groups import axis_of
from pipermoe.runtime.meter import Meter
from pipermoe.schedule.action import Action
from pipermoe.specs.report import MEMORY_CATEGORIES, MemoryCategory, RankReport, Traffic

aten = torch.ops.aten


class Counter(TorchDispatchMode):
    """Observes every operation of a block, after it has run."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled; torch's guard against it costs as much as an operation

    def observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Called as the block begins."""

    def stop(self) -> None:
        """Called as the block ends."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what `see` is told in the block."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    def __enter__(self) -> Any:
        self.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.stop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.see(func, args, kwargs, result)
        return result

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Observe an operation, unless it is only a question about a tensor."""
        if func.namespace != "prim":
            self.observe(func, args, kwargs, result)


class Counters(Counter):
    """Several counters in one mode: an operation passes through Python once, not once for each of them."""

    def __init__(self, *counters: Counter):
        super().__init__()
        self._counters = counters

    def start(self) -> None:
        for counter in self._counters:
            counter.start()

    def stop(self) -> None:
        for counter in self._counters:
            counter.stop()

    def observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        for counter in self._counters:
            counter.observe(func, args, kwargs, result)


class MemoryCounter(Counter):
    """Peak bytes of live storages. Each storage counts once, from its birth until its last reference is gone.

    `known` tensors (weights, gradients, optimizer state) count from the start; everything else counts if born inside
    the block, in the category that `meter.phase` has at its birth. `bytes_at_peak` adds up to `peak_bytes`, which
    `action_at_peak` was the first to reach; `peak_by_action` has the most that was live during each action in which
    something was born.
    """

    def __init__(self, meter: Meter, known: Mapping[MemoryCategory, Iterable[Tensor]]):
        super().__init__()
        self._meter = meter
        self._live: dict[MemoryCategory, int] = dict.fromkeys(MEMORY_CATEGORIES, 0)
        self._total = 0
        self._free: dict[int, Any] = {}  # by id of a storage that lives, what subtracts it
        self.peak_bytes, self.bytes_at_peak = 0, dict(self._live)
        self.action_at_peak: Action | str = ""
        self.peak_by_action: dict[Action | str, int] = {}
        for category, tensors in known.items():
            for tensor in tensors:
                self._add(tensor.untyped_storage(), category)

    def start(self) -> None:
        self._meter.on_release = self._release

    def stop(self) -> None:
        self._meter.on_release = None

    def observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        born = {id(storage): storage for storage in _storages(result) if id(storage) not in self._free}
        for storage in _storages((args, kwargs)) if born else ():
            born.pop(id(storage), None)  # a view of, or written into, something older than the block
        for storage in born.values():
            self._add(storage, self._meter.phase)

    def _add(self, storage: torch.UntypedStorage, category: MemoryCategory) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._free:
            return
        self._free[key] = weakref.finalize(storage, self._subtract, key, category, size)
        self._live[category] += size
        self._total += size
        action = self._meter.action
        if self._total > self.peak_by_action.get(action, 0):
            self.peak_by_action[action] = self._total
        if self._total > self.peak_bytes:
            self.peak_bytes, self.bytes_at_peak, self.action_at_peak = self._total, dict(self._live), action

    def _subtract(self, key: int, category: MemoryCategory, size: int) -> None:
        del self._free[key]
        self._live[category] -= size
        self._total -= size

    def _release(self, tensor: Tensor) -> None:
        finalizer = self._free.get(id(tensor.untyped_storage()))
        if finalizer is not None:
            finalizer()  # at most once, now or when the storage dies


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of all tensors in nested arguments (torch's pytree takes longer than most operations)."""
    if isinstance(tree, Tensor):
        yield tree.untyped_storage()
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from _storages(each)
    elif isinstance(tree, dict):
        yield from _storages(list(tree.values()))


class FlopCounter(Counter):
    """FLOPs of matrix products and attention; a multiply-add counts as 2, element-wise work as none.

    Attention counts the full square that the CPU kernel computes, and its backward twice the forward, as everywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet = func._overloadpacket
        if packet in _FLOPS:
            self.add(_FLOPS[packet](*args), args)
        elif packet in flop_registry:
            self.add(flop_registry[packet](*args, **kwargs, out_val=result), args)

    def add(self, flops: int, operands: Any) -> None:
        """Count the FLOPs of one operation on `operands`."""
        self.flops += flops


def _grouped_product_flops(a: Tensor, b: Tensor, *_: Any) -> int:
    """(rows, K) x (experts, K, N), or of a weight gradient (K, rows) x (rows, N)."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1]


def _attention_flops(query_BHSC: Tensor, key_BGSC: Tensor, value_BGSC: Tensor, *_: Any) -> int:
    batch, heads, queries, query_dim = query_BHSC.shape
    return 2 * batch * heads * queries * key_BGSC.shape[2] * (query_dim + value_BGSC.shape[3])


# What torch's registry lacks.
_FLOPS: dict[Any, Callable[..., int]] = {
    aten.addmm_: lambda total, a, b, *_: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    aten._grouped_mm: _grouped_product_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, *operands: 2 * _attention_flops(*operands),
}


class TrafficCounter(Counter):
    """Calls and bytes of each collective as `specs.report.Traffic` defines them, keyed "collective.axis".

    An exchange of int64 is the routing counts', "all_to_all_counts". A group of one rank communicates nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[str, int] = defaultdict(int)
        self._bytes: dict[str, int] = defaultdict(int)

    @property
    def traffic(self) -> dict[str, Traffic]:
        return {key: Traffic(calls=self._calls[key], bytes=self._bytes[key]) for key in sorted(self._calls)}

    def observe(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)

    def _count(self, operation: str, args: Any) -> None:
        if operation == "alltoall_base_":
            self.count_all_to_all(dist.ProcessGroup.unbox(args[2]), args[1], args[4])
        if operation not in _TRAFFIC:
            return
        collective, size, group_position = _TRAFFIC[operation]
        group = dist.ProcessGroup.unbox(args[group_position])
        if group.size() > 1:
            self.add(f"{collective}.{axis_of(group)}", size(args))

    def count_all_to_all(self, group: dist.ProcessGroup, sent: Tensor, sent_rows: Sequence[int] | None) -> None:
        """The bytes that leave this rank; no rows mean equal parts."""
        if group.size() == 1:
            return
        rows = list(sent_rows or ()) or [sent.shape[0] // group.size()] * group.size()
        leaving = (sum(rows) - rows[group.rank()]) * math.prod(sent.shape[1:]) * sent.element_size()
        collective = "all_to_all_counts" if sent.dtype == torch.int64 else "all_to_all"
        self.add(f"{collective}.{axis_of(group)}", leaving)

    def add(self, key: str, sent_bytes: int) -> None:
        """Count one call of the collective `key`."""
        self._calls[key] += 1
        self._bytes[key] += sent_bytes


def counted_report(rank: int, memory: MemoryCounter, flops: FlopCounter, traffic: TrafficCounter) -> RankReport:
    """What the counters have seen of one step of a rank; without seconds, for counting slows a step down."""
    return RankReport(
        rank=rank,
        peak_bytes=memory.peak_bytes,
        memory_bytes=memory.bytes_at_peak,
        flops=flops.flops,
        traffic=traffic.traffic,
        seconds={},
    )


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# Operation of c10d: (collective, its bytes, where its arguments hold the group).
_TRAFFIC: dict[str, tuple[str, Callable[[Any], int], int]] = {
    "send": ("send", lambda args: sum(map(_size, args[0])), 1),
    "allreduce_": ("all_reduce", lambda args: sum(map(_size, args[0])), 1),
    "_allgather_base_": ("all_gather", lambda args: _size(args[0]), 2),
    "_reduce_scatter_base_": ("reduce_scatter", lambda args: _size(args[1]), 2),
}

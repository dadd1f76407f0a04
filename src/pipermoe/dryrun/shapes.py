"""Fake tensors at speed: an operation on operands of known shapes has a known result.

A dry run repeats the same layer for every micro-batch. torch's FakeTensorMode works out every operation anew, or finds
it in a cache whose key takes longer than the operation; `ShapeMode` remembers what an operation made of operands of the
same sizes, strides and types, and makes the same again: new storage, a view of an operand, or the operand itself.
It also tells a counter of every operation, as two modes would pass each of them through Python twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

from pipermoe.runtime.counters import Counter

CPU = torch.device("cpu")
META = torch.device("meta")
DEVICE = torch.ops.prim.device.default


class Made(NamedTuple):
    """One result: operand number `operand` itself, a view of it (with `size`), or new storage (`operand` -1)."""

    operand: int
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype | None = None


class Recipe(NamedTuple):
    """All results of an operation; `several` if it returns a tuple or list of that type."""

    results: tuple[Made, ...]
    several: type | None


class ShapeMode(FakeTensorMode):
    """FakeTensorMode with a memory of operations, for programs on the CPU.

    What it cannot remember it leaves to torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._recipes: dict[Any, Recipe | None] = {}
        self._counter: Counter | None = None
        self._like = vars(FakeTensor(self, torch.empty(0, device=META), CPU))

    @contextmanager
    def counted(self, counter: Counter) -> Iterator[None]:
        """`counter` observes every operation of the block, but not those that torch makes one of."""
        with counter.watching():
            self._counter = counter
            yield
            self._counter = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled; torch's guard against it costs as much as an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:  # autograd asks twice about every tensor
            return args[0].fake_device
        counter, self._counter = self._counter, None
        try:
            result = self.dispatch(func, types, args, kwargs)
        finally:
            self._counter = counter
        if counter is not None:
            counter.see(func, args, kwargs or {}, result)
        return result

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":
            return super().dispatch(func, types, args, kwargs)
        operands: list[FakeTensor] = []
        try:
            key = (func, _key(args, operands), _key(tuple(kwargs.items()), operands) if kwargs else ())
            recipe = self._recipes.get(key, ...)
        except _Unknown:
            return super().dispatch(func, types, args, kwargs)
        if recipe is None or not operands:  # not to be remembered; a constructor has its device to look at
            return super().dispatch(func, types, args, kwargs)
        if recipe is ...:
            result = super().dispatch(func, types, args, kwargs)
            self._recipes[key] = _learn(key, args, kwargs, operands, result)
            return result
        made = [self._make(each, operands) for each in recipe.results]
        return recipe.several(made) if recipe.several else made[0]

    def _make(self, made: Made, operands: list[FakeTensor]) -> FakeTensor:
        if made.size is None:
            return operands[made.operand]
        if made.operand < 0:
            return self._faked(torch.empty_strided(made.size, made.stride, dtype=made.dtype, device=META))
        with in_kernel_invocation_manager(self):
            view = torch.as_strided(operands[made.operand], made.size, made.stride, made.offset)
        return self._faked(view)

    def _faked(self, meta: Tensor) -> FakeTensor:
        """`FakeTensor(self, meta, CPU)` in a tenth of its time: each differs in nothing but what it wraps."""
        if type(meta) is FakeTensor:
            return meta
        fake = Tensor._make_subclass(FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=CPU)
        vars(fake).update(self._like)
        return fake


class _Unknown(Exception):
    """An argument that is no part of a key."""


def _key(value: Any, operands: list[FakeTensor]) -> Any:
    """What of an argument decides the result; tensors are collected in `operands`."""
    kind = type(value)
    if kind is FakeTensor:
        operands.append(value)
        return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype
    if kind is tuple or kind is list:
        return kind, tuple([_key(each, operands) for each in value])
    if kind in _PLAIN:
        return kind, value
    raise _Unknown


_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


def _learn(key: Any, args: Any, kwargs: Any, operands: list[FakeTensor], result: Any) -> Recipe | None:
    """How `result` came from the operands, or None where that cannot be told from their shapes."""
    if (_key(args, []), _key(tuple(kwargs.items()), []) if kwargs else ()) != key[1:]:
        return None  # an operand was resized
    several = type(result) if isinstance(result, (tuple, list)) else None
    if several not in (None, tuple, list):
        return None
    made = []
    new: set[int] = set()
    for each in result if several else (result,):
        if type(each) is not FakeTensor:
            return None
        found = _made(each, operands)
        if found is None or (found.operand < 0 and id(each.untyped_storage()) in new):
            return None
        new.add(id(each.untyped_storage()))
        made.append(found)
    return Recipe(tuple(made), several)


def _made(result: FakeTensor, operands: list[FakeTensor]) -> Made | None:
    for number, operand in enumerate(operands):
        if result is operand:
            return Made(number)
    size, stride, offset, dtype = tuple(result.shape), result.stride(), int(result.storage_offset()), result.dtype
    storage = result.untyped_storage()
    for number, operand in enumerate(operands):
        if operand.untyped_storage() is storage:
            return Made(number, size, stride, offset) if dtype == operand.dtype else None
    extent = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset or storage.nbytes() != extent * result.element_size():
        return None
    return Made(-1, size, stride, 0, dtype)

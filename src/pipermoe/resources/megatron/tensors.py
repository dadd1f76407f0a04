"""What a module is to a memory profile: the weights it owns and the tensors it saves for its backward."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

BF16, FP32, BOOL, INT64, INT32 = 2, 4, 1, 8, 4  # bytes of an element


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter as one rank holds it. `copies`: how many of this shape (one per local expert).

    `fused_gradient`: its GEMM adds the gradient to the main gradient and hands autograd a placeholder of this shape.
    """

    name: str
    shape: tuple[int, ...]
    copies: int = 1
    routed: bool = False
    fused_gradient: bool = True

    @property
    def elements(self) -> int:
        return prod(self.shape) * self.copies


@dataclass(frozen=True, slots=True)
class Saved:
    """A tensor that autograd keeps from forward to backward; bytes on one rank for one micro-batch."""

    name: str
    bytes: float

    @classmethod
    def of(cls, name: str, *shape: float, element: int = BF16) -> Saved:
        return cls(name, prod(shape) * element)


@dataclass(frozen=True, slots=True)
class Module:
    """One module of a stage. `forward_extra`, `backward_extra`: bytes it holds for a moment beside what is saved."""

    name: str
    weights: tuple[Weight, ...] = ()
    saved: tuple[Saved, ...] = ()
    forward_extra: float = 0
    backward_extra: float = 0

    @property
    def saved_bytes(self) -> float:
        return sum(tensor.bytes for tensor in self.saved)

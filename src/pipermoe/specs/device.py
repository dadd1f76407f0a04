"""Device: what one rank computes with, as rates against problem sizes."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipermoe.specs.base import Frozen
from pipermoe.specs.precision import Precision
from pipermoe.specs.units import Bytes, FlopsPerSecond, Seconds

# Memory-bound work by what it is; the elements that count are in the comment.
Pass = Literal[
    "norm",
    "head_norm",
    "residual",
    "rope",
    "swiglu",
    "router",
    "permute",
    "combine",
    "loss",
    "optimizer",
    "gradient_norm",
]
PASSES: tuple[Pass, ...] = (
    "norm",  # RMSNorm of the stream: tokens x hidden
    "head_norm",  # RMSNorm of every query or key head: tokens x heads x head_dim
    "residual",  # adding a branch to the stream: tokens x hidden
    "rope",  # rotating queries or keys: tokens x heads x head_dim
    "swiglu",  # silu(gate) * up: rows x expert_width (one half of the gate_up output)
    "router",  # softmax, top-k, normalising, sorting by expert: tokens x top_k
    "permute",  # gathering rows for the all-to-all or sorting them by expert: rows x hidden
    "combine",  # weighting rows and adding them up per token: rows x hidden
    "loss",  # cross-entropy of logits: tokens x vocab_size
    "optimizer",  # one AdamW update: parameters
    "gradient_norm",  # norm and scaling of gradients: parameters
)


class RateCurve(Frozen):
    """An achieved rate against a problem size: linear in the logarithm of the size, constant beyond the ends."""

    size: tuple[PositiveFloat, ...]
    rate: tuple[PositiveFloat, ...]

    @model_validator(mode="after")
    def _is_a_curve(self) -> RateCurve:
        if len(self.size) != len(self.rate) or not self.size:
            raise ValueError("size and rate must be lists of the same length, at least 1")
        if any(a >= b for a, b in pairwise(self.size)):
            raise ValueError("size must ascend")
        return self


class GroupedCurve(RateCurve):
    """FLOP/s of one expert's products against its rows, for experts of one `width` (the narrower matrix dimension)."""

    width: PositiveInt


class PassRate(Frozen):
    """Elements/s of one kind of memory-bound work against its elements, in the forward and in the backward direction.

    Seconds of one pass over n elements = n / rate(n). Launching its kernels and autograd's bookkeeping are included.
    """

    forward: RateCurve
    backward: RateCurve | None = Field(default=None, description="none where there is no gradient (optimizer, norm)")


class Device(Frozen):
    """One rank's device: an accelerator, or on a CPU one process with one thread. Rates are those of a rank alone.

    Seconds of one operation = its work / rate(its size). Every curve includes the fixed cost of its own calls.

    - `gemm`: FLOP/s of one matrix product against its FLOPs; the mean over y = x W, dx = dy W', dW = x' dy.
    - `grouped_gemm`: FLOP/s of one expert's products (the same three forms) against that expert's rows, a curve per
      expert width; between two widths linear in the logarithm of the width. A grouped product takes the sum over its
      experts of FLOPs / rate(rows): so skew is priced by the rows of each expert.
    - `attention`, `attention_backward`: FLOP/s of the causal attention core against the sequence length. The FLOPs are
      the full square, 4 x tokens x seq_len x heads x head_dim forward and twice that backward
      (`resources.flops.LayerFlops.attention_core` with causal=False), whatever the kernel skips or recomputes.
    - `attention_head_sizes`: the rate at heads of other sizes as a share of those curves' rates, against the size of a
      query's head; all sizes alike where it is not known.
    - `pads_values`: the attention kernel wants values as wide as queries and gets narrower ones (latent attention's)
      filled up with zeros, as torch's on CPUs and FlashAttention 2. Their FLOPs then count like the others.
    - `memory_bound`: bytes/s of element-wise operations against the bytes that one operation reads and writes
      (caches make it a curve). For work that `passes` does not name, and for a datasheet the only figure: one point.
    - `passes`: elements/s of named memory-bound work (`Pass`). Empty on a datasheet: then use bytes and `memory_bound`.
    - `kernel_seconds`: issuing one operation on a tiny tensor, autograd's share included. Add it per operation that
      is priced by `memory_bound`; curves and passes hold it already.
    - `layer_forward_seconds`, `layer_backward_seconds`: what one layer costs beyond the sum of its curves, whatever its
      size: operations in turn find cold code where repeated ones find warm. Add once per layer and direction (a
      recomputed layer's forward again). 0 on a datasheet.
    - `issue_seconds`: the host's time to issue one layer in one direction to an accelerator; a layer that computes for
      less waits for it. 0 where the host computes itself, or replays graphs.
    - `peak_flops_per_s`: the basis of utilisation (MFU); measured platforms give the fastest product seen.
    """

    name: str
    memory_bytes: Bytes = Field(gt=0)
    peak_flops_per_s: dict[Precision, Annotated[FlopsPerSecond, Field(gt=0)]]
    gemm: dict[Precision, RateCurve]
    grouped_gemm: dict[Precision, Annotated[tuple[GroupedCurve, ...], Field(min_length=1)]]
    attention: dict[Precision, RateCurve]
    attention_backward: dict[Precision, RateCurve]
    attention_head_sizes: RateCurve | None = None
    pads_values: bool = False
    memory_bound: RateCurve
    passes: dict[Precision, dict[Pass, PassRate]] = {}
    kernel_seconds: Seconds = Field(ge=0)
    layer_forward_seconds: Seconds = Field(default=0.0, ge=0)
    layer_backward_seconds: Seconds = Field(default=0.0, ge=0)
    issue_seconds: Seconds = Field(default=0.0, ge=0)

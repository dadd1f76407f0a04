"""One rank measures its device: matrix products, attention, memory-bound passes, the cost of one operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pipermoe.measure import passes
from pipermoe.measure.clock import Call, Clock, time_call
from pipermoe.measure.kernels import Directions, Kernels, cold
from pipermoe.measure.layer import layer_calls
from pipermoe.measure.samples import Point
from pipermoe.measure.sizes import Effort, Widths

Points = dict[str, list[Point]]
LARGE_PRODUCT = 1024  # tokens, inner and outer width of the product that shows the device's best rate
TOKENS_OF_ATTENTION = 1024  # at least one sequence
GRAPH_OPERATIONS = 64
LAYERS = 6  # each with its own operands, as in a stage
REPEATED_SECONDS = 2e-3
PASS_TENSORS = 4  # about so many tensors does a pass read and write
MOST_ELEMENTS = 2**24  # of one tensor of a pass: 64 MiB


class Bench:
    """Times calls with one clock and keeps the points by the name of what was measured."""

    def __init__(self, kernels: Kernels, widths: Widths, effort: Effort, clock: Clock) -> None:
        self.kernels, self.widths, self.effort, self.clock = kernels, widths, effort, clock
        self.points: Points = {}

    def timed(self, size: float, work: float, calls: Iterable[Call]) -> Point:
        """Measure `calls`, which do `work` together."""
        samples = [time_call(call, self.clock, self.effort.compute_seconds) for call in calls]
        seconds = sum(sample.seconds for sample in samples)
        spread = max(sample.spread for sample in samples)
        kept, dropped = sum(sample.kept for sample in samples), sum(sample.dropped for sample in samples)
        return Point(size, work, seconds, round(spread, 4), kept, dropped)

    def point(self, key: str, size: float, work: float, calls: Iterable[Call]) -> Point:
        """Measure `calls` and keep the point under `key`."""
        point = self.timed(size, work, calls)
        self.points.setdefault(key, []).append(point)
        return point

    def sweep(self, key: str, cases: Iterable[Case]) -> None:
        """Measure cases of growing work until one call would take too long."""
        last: Point | None = None
        for case in cases:
            if last and case.work / last.rate > self.effort.longest_call_seconds:
                return
            last = self.point(key, case.size, case.work, cold(case.build, case.operand_bytes))


@dataclass(frozen=True, slots=True)
class Case:
    """One problem of a sweep: its abscissa, its work, the bytes of its operands and results, and how to make it."""

    size: float
    work: float
    operand_bytes: float
    build: Callable[[], Sequence[Call]]


def products(bench: Bench) -> None:
    """`gemm`: the dense layers' three products against FLOPs, and one large square product."""
    widths = bench.widths
    for outer in sorted({widths.key_value, widths.query}):
        bench.sweep("gemm", (_product(bench, tokens, widths.hidden, outer) for tokens in bench.effort.tokens))
    bench.sweep("gemm", [_product(bench, LARGE_PRODUCT, LARGE_PRODUCT, LARGE_PRODUCT)])


def _product(bench: Bench, tokens: int, inner: int, outer: int) -> Case:
    flops = 2 * tokens * inner * outer
    operand_bytes = bench.kernels.element_bytes * (2 * tokens * (inner + outer) + 2 * inner * outer)
    return Case(flops, 3 * flops, operand_bytes, partial(bench.kernels.product, tokens, inner, outer))


def grouped_products(bench: Bench) -> None:
    """`grouped_gemm`: an expert block's products against rows per expert; `grouped_skew`: one call with uneven rows.

    `grouped_skew` has one point for each expert, of its rows and FLOPs, with the seconds of the whole call.
    """
    widths, rows_per_expert = bench.widths, bench.effort.rows_per_expert
    bench.sweep("grouped_gemm", (_expert_block(bench, [rows] * widths.experts) for rows in rows_per_expert))
    skewed = skewed_rows(widths.experts, rows_per_expert[len(rows_per_expert) // 2])
    case = _expert_block(bench, skewed)
    whole = bench.timed(0, case.work, cold(case.build, case.operand_bytes))
    bench.points["grouped_skew"] = [replace(whole, size=rows, work=_grouped_flops([rows], widths)) for rows in skewed]


def skewed_rows(experts: int, mean_rows: int) -> list[int]:
    """Rows in proportion to 1, 1/2, 1/3, ... with the given mean: a realistic imbalance (largest / mean is about 3)."""
    harmonic = sum(1 / (e + 1) for e in range(experts))
    return [max(1, round(experts * mean_rows / (e + 1) / harmonic)) for e in range(experts)]


def _expert_block(bench: Bench, rows: list[int]) -> Case:
    widths, kernels = bench.widths, bench.kernels

    def build() -> Sequence[Call]:
        gate_up = kernels.grouped_product(rows, widths.hidden, 2 * widths.expert_width)
        return *gate_up, *kernels.grouped_product(rows, widths.expert_width, widths.hidden)

    matrices = 3 * widths.experts * widths.hidden * widths.expert_width
    activations = sum(rows) * (4 * widths.hidden + 6 * widths.expert_width)
    return Case(rows[0], _grouped_flops(rows, widths), kernels.element_bytes * (2 * matrices + activations), build)


def _grouped_flops(rows: list[int], widths: Widths) -> float:
    return 3 * 2 * sum(rows) * 3 * widths.hidden * widths.expert_width


def attention(bench: Bench) -> None:
    """`attention.forward` and `attention.backward`: the attention core against the sequence length."""
    widths = bench.widths
    for seq_len in bench.effort.seq_lens:
        batch = max(1, TOKENS_OF_ATTENTION // seq_len)
        flops = 4 * batch * seq_len**2 * widths.num_heads * widths.head_dim
        done = bench.points.get("attention.backward")
        if done and 2 * flops / done[-1].rate > bench.effort.longest_call_seconds:
            return
        build = _both(partial(bench.kernels.attention, batch, seq_len, widths))
        element_bytes = bench.kernels.element_bytes
        forward, backward = cold(build, 8 * element_bytes * batch * seq_len * widths.num_heads * widths.head_dim)
        bench.point("attention.forward", seq_len, flops, [forward])
        bench.point("attention.backward", seq_len, 2 * flops, [backward])


def _both(build: Callable[[], Directions]) -> Callable[[], Sequence[Call]]:
    def calls() -> Sequence[Call]:
        directions = build()
        return directions.forward, directions.backward

    return calls


def memory_bound(bench: Bench) -> None:
    """`memory_bound`: bytes/s of an addition against its bytes; `kernel_seconds`: one operation on a tiny tensor."""
    moved = 3 * bench.kernels.element_bytes  # bytes for each element: two operands, one result
    bench.sweep(
        "memory_bound",
        (
            Case(moved * n, moved * n, moved * n, partial(bench.kernels.addition, n))
            for n in bench.effort.element_counts
        ),
    )
    bench.point("kernel_seconds", 1, 2 * GRAPH_OPERATIONS, [bench.kernels.tiny_graph(GRAPH_OPERATIONS)])


def memory_bound_passes(bench: Bench) -> None:
    """`passes.KIND.forward` and `.backward`: elements/s of the named memory-bound work."""
    kernels, widths, effort = bench.kernels, bench.widths, bench.effort
    for kind, build in passes.TOKEN_PASSES.items():
        for tokens in effort.pass_tokens:
            row = widths.vocab if kind == "loss" else widths.widest_row
            if tokens * row > MOST_ELEMENTS and tokens > effort.pass_tokens[0]:
                break
            elements = passes.elements(kind, tokens, widths)
            calls = cold(
                _both(partial(build, kernels, tokens, widths)), PASS_TENSORS * kernels.element_bytes * elements
            )
            for direction, call in zip(("forward", "backward"), calls, strict=True):
                bench.point(f"passes.{kind}.{direction}", elements, elements, [call])
    masters = kernels.in_fp32()
    for count in effort.parameter_counts:
        bench.point("passes.optimizer.forward", count, count, [passes.optimizer(masters, count)])
        bench.point("passes.gradient_norm.forward", count, count, [passes.gradient_norm(masters, count)])


def whole_layers(bench: Bench) -> None:
    """`layer.forward` and `layer.backward`: what a layer's operations cost in turn beyond what each costs repeated."""
    layers = [layer_calls(bench.kernels, bench.widths) for _ in range(LAYERS)]
    for direction in ("forward", "backward"):
        calls = [getattr(layer, direction) for layer in layers]
        in_turn = bench.timed(1, 1, [_in_turn([call for layer in calls for call in layer])])
        repeated = sum(time_call(call, bench.clock, REPEATED_SECONDS).seconds for call in calls[0])
        extra = max(0.0, in_turn.seconds / LAYERS - repeated)
        bench.points[f"layer.{direction}"] = [replace(in_turn, seconds=extra)]


def _in_turn(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


SECTIONS: tuple[tuple[str, Callable[[Bench], None]], ...] = (
    ("matrix products", products),
    ("grouped products of experts", grouped_products),
    ("attention", attention),
    ("element-wise operations", memory_bound),
    ("memory-bound passes", memory_bound_passes),
    ("whole layers", whole_layers),
)

"""One rank measures its device: matrix products, attention, memory-bound passes, the cost of one operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from pipermoe.measure import passes
from pipermoe.measure.clock import Call, Clock, time_call
from pipermoe.measure.kernels import Kernels
from pipermoe.measure.samples import Point
from pipermoe.measure.sizes import Effort, Widths

Points = dict[str, list[Point]]
Build = Callable[[], tuple[Call, ...]]
LARGE_PRODUCT = 1024  # tokens, inner and outer width of the product that shows the device's best rate
TOKENS_OF_ATTENTION = 1024  # at least one sequence
GRAPH_OPERATIONS = 64
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

    def sweep(self, key: str, cases: Iterable[tuple[float, float, Build]]) -> None:
        """Measure (size, work, build) cases of growing work until one call would take too long."""
        last: Point | None = None
        for size, work, build in cases:
            if last and work / last.rate > self.effort.longest_call_seconds * 3:
                return
            last = self.point(key, size, work, build())


def products(bench: Bench) -> None:
    """`gemm`: the dense layers' three products against FLOPs, and one large square product."""
    widths, tokens = bench.widths, bench.effort.tokens
    for outer in sorted({widths.key_value, widths.query}):
        bench.sweep(
            "gemm",
            ((2 * t * widths.hidden * outer, 6 * t * widths.hidden * outer, _product(bench, t, outer)) for t in tokens),
        )
    large = LARGE_PRODUCT
    bench.point("gemm", 2 * large**3, 6 * large**3, bench.kernels.product(large, large, large))


def _product(bench: Bench, tokens: int, outer: int) -> Build:
    return lambda: bench.kernels.product(tokens, bench.widths.hidden, outer)


def grouped_products(bench: Bench) -> None:
    """`grouped_gemm`: an expert block's products against rows per expert; `grouped_skew`: one call with uneven rows.

    `grouped_skew` has one point for each expert, of its rows and FLOPs, with the seconds of the whole call.
    """
    widths, rows_per_expert = bench.widths, bench.effort.rows_per_expert
    bench.sweep(
        "grouped_gemm", ((r, _grouped_flops([r] * widths.experts, widths), _grouped(bench, r)) for r in rows_per_expert)
    )
    rows = skewed_rows(widths.experts, rows_per_expert[len(rows_per_expert) // 2])
    whole = bench.timed(0, _grouped_flops(rows, widths), _expert_block(bench, rows))
    bench.points["grouped_skew"] = [replace(whole, size=r, work=_grouped_flops([r], widths)) for r in rows]


def skewed_rows(experts: int, mean_rows: int) -> list[int]:
    """Rows in proportion to 1, 1/2, 1/3, ... with the given mean: a realistic imbalance (largest / mean is about 3)."""
    harmonic = sum(1 / (e + 1) for e in range(experts))
    return [max(1, round(experts * mean_rows / (e + 1) / harmonic)) for e in range(experts)]


def _grouped(bench: Bench, rows: int) -> Build:
    return lambda: _expert_block(bench, [rows] * bench.widths.experts)


def _expert_block(bench: Bench, rows: list[int]) -> tuple[Call, ...]:
    widths = bench.widths
    gate_up = bench.kernels.grouped_product(rows, widths.hidden, 2 * widths.expert_width)
    down = bench.kernels.grouped_product(rows, widths.expert_width, widths.hidden)
    return *gate_up, *down


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
        core = bench.kernels.attention(batch, seq_len, widths)
        bench.point("attention.forward", seq_len, flops, [core.forward])
        bench.point("attention.backward", seq_len, 2 * flops, [core.backward])


def memory_bound(bench: Bench) -> None:
    """`memory_bound`: bytes/s of an addition against its bytes; `kernel_seconds`: one operation on a tiny tensor."""
    bytes_per_element = 3 * bench.kernels.random(1).element_size()
    bench.sweep(
        "memory_bound",
        ((bytes_per_element * n, bytes_per_element * n, _addition(bench, n)) for n in bench.effort.element_counts),
    )
    bench.point("kernel_seconds", 1, 2 * GRAPH_OPERATIONS, [bench.kernels.tiny_graph(GRAPH_OPERATIONS)])


def _addition(bench: Bench, elements: int) -> Build:
    return lambda: (bench.kernels.addition(elements),)


def memory_bound_passes(bench: Bench) -> None:
    """`passes.KIND.forward` and `.backward`: elements/s of the named memory-bound work."""
    kernels, widths, effort = bench.kernels, bench.widths, bench.effort
    for kind, build in passes.TOKEN_PASSES.items():
        for tokens in effort.pass_tokens:
            row = widths.vocab if kind == "loss" else widths.widest_row
            if tokens * row > MOST_ELEMENTS and tokens > effort.pass_tokens[0]:
                break
            elements, directions = build(kernels, tokens, widths)
            bench.point(f"passes.{kind}.forward", elements, elements, [directions.forward])
            bench.point(f"passes.{kind}.backward", elements, elements, [directions.backward])
    for count in effort.parameter_counts:
        bench.point("passes.optimizer.forward", count, count, [passes.optimizer(kernels, count)])
        bench.point("passes.gradient_norm.forward", count, count, [passes.gradient_norm(kernels, count)])


SECTIONS: tuple[tuple[str, Callable[[Bench], None]], ...] = (
    ("matrix products", products),
    ("grouped products of experts", grouped_products),
    ("attention", attention),
    ("element-wise operations", memory_bound),
    ("memory-bound passes", memory_bound_passes),
)

"""Fit the catalogue's curves of NVIDIA devices to the kernel and NCCL tables of the wheel aiconfigurator-core.

    python -m venv .venv-fits
    .venv-fits/bin/pip install pandas pyarrow
    .venv-fits/bin/pip install --no-deps aiconfigurator-core==0.12.0      # Apache-2.0, 82 MB
    .venv-fits/bin/python tools/fit_catalogue.py

writes src/pipermoe/catalogue/curves/*.toml and collectives/nccl-*.toml. Units, found by comparing with known link and
matrix rates: latency in ms; NCCL message sizes in elements of 2 bytes, of the whole tensor; tokens of the MoE tables
are those of all expert-parallel ranks together. All kernels are forward ones of inference; per shape the best
framework counts.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd  # pyright: ignore[reportMissingImports]

CATALOGUE = Path(__file__).parents[1] / "src/pipermoe/catalogue"
SOURCE = "aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0)"

# Name in the catalogue, folder of the wheel, rate of attention's backward against its forward at 4 Ki and 16 Ki tokens.
HOPPER, BLACKWELL, ASSUMED = (422 / 553, 523 / 638), (1083 / 1324, 1298 / 1698), (0.8, 0.8)
DEVICES = {
    "a100": ("a100_sxm", ASSUMED),
    "h100": ("h100_sxm", HOPPER),
    "h200": ("h200_sxm", HOPPER),
    "b200": ("b200_sxm", BLACKWELL),
    "b300": ("b300_sxm", BLACKWELL),
    "gb200": ("gb200", BLACKWELL),
    "gb300": ("gb300", BLACKWELL),
}
BACKWARD_CREDIT = 2 / 2.5  # published backward rates count 2.5 forwards, the resource model 2
NVLINK = {"a100": 300e9, "h100": 450e9, "h200": 450e9, "b200": 900e9, "b300": 900e9, "gb200": 900e9, "gb300": 900e9}
# Bytes/s of memory that are reached: 0.8 of the datasheet, as in the wheel's systems/*.yaml.
BANDWIDTH = {"a100_sxm": 2.039, "h100_sxm": 3.35, "h200_sxm": 4.8, "b200_sxm": 7.7, "b300_sxm": 7.75}
REACHED = {system: 0.8e12 * BANDWIDTH.get(system, 8.0) for system, _ in DEVICES.values()}
PRECISIONS = {"bf16": ("bfloat16",), "fp8": ("fp8", "fp8_block")}
WIDTHS = (512, 1024, 2048, 4096)
COLLECTIVES = {
    "all_to_all": "alltoall",
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
}


def tables(system: str, pattern: str) -> pd.DataFrame:
    """All versions of one table of the wheel, for one system."""
    package = importlib.util.find_spec("aiconfigurator_core")
    if package is None or package.submodule_search_locations is None:
        raise SystemExit("aiconfigurator-core is not installed: see the top of this file")
    files = Path(package.submodule_search_locations[0], "systems/data", system).glob(f"{pattern}.parquet")
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


def curve(size: pd.Series, rate: pd.Series, octaves: int = 2) -> tuple[list[float], list[float], float]:
    """Sizes, median rates and the relative RMS error of the curve over all shapes; a point every `octaves`."""
    step = np.round(np.log2(size) / octaves) * octaves
    medians = rate.groupby(step).median()
    fitted = np.interp(np.log2(size), medians.index, medians.values)
    residual = float(np.sqrt(np.mean((fitted / rate - 1) ** 2)))
    return [2.0**n for n in medians.index], medians.tolist(), residual


def gemm(system: str, kinds: tuple[str, ...]):
    """FLOP/s against FLOPs over shapes of at least 1024 rows and 256 columns, as training has them."""
    table = tables(system, "gemm/*/*/gemm_perf")
    table = table[table.gemm_dtype.isin(kinds) & (table.m >= 1024) & (table.n >= 256) & (table.k >= 256)]
    best = table.groupby(["m", "n", "k"]).latency.min().reset_index()
    flops = 2.0 * best.m * best.n * best.k
    return curve(flops, flops / (best.latency * 1e-3))


def grouped(system: str, kinds: tuple[str, ...]):
    """(width, curve) of balanced gated experts on one device: FLOP/s against rows of an expert."""
    table = tables(system, "moe/*/*/moe_perf")
    plain = ~table.kernel_source.str.contains("nongated|situ")
    one = (table.moe_tp_size == 1) & (table.moe_ep_size == 1) & (table.distribution == "balanced")
    table = table[table.moe_dtype.isin(kinds) & plain & one]
    shape = ["hidden_size", "inter_size", "num_experts", "topk", "num_tokens"]
    best = table.groupby(shape).latency.min().reset_index()
    rows = best.num_tokens * best.topk / best.num_experts
    # The kernels fuse what the resource model prices on its own: permuting, SwiGLU and combining, by bytes.
    moved = 2.0 * best.num_tokens * best.topk * (4 * best.hidden_size + 3 * best.inter_size)
    seconds = np.maximum(best.latency * 1e-3 - moved / REACHED[system], 0.5e-3 * best.latency)
    rate = 6.0 * best.num_tokens * best.topk * best.hidden_size * best.inter_size / seconds
    width = 2 ** np.round(np.log2(np.minimum(best.hidden_size, best.inter_size)))
    for each in WIDTHS:
        here = (width == each) & (rows >= 8)
        if here.any():
            yield each, curve(rows[here], rate[here])


def attention(system: str):
    """FLOP/s, credited with the full square, against the sequence, for bf16 heads of 128 and at least 16 of them."""
    table = tables(system, "attention/*/*/context_attention_perf")
    full = (table.window_size.fillna(0) == 0) if "window_size" in table else True
    bf16 = (table.attn_dtype == "bfloat16") & (table.kv_cache_dtype == "bfloat16")
    table = table[full & bf16 & (table.head_dim == 128) & (table.num_heads >= 16)]
    best = table.groupby(["batch_size", "isl", "num_heads"]).latency.min().reset_index()
    flops = 4.0 * best.batch_size * best.isl.astype(float) ** 2 * best.num_heads * 128
    keep = (best.isl >= 512) & (best.batch_size * best.isl <= 65536)
    return curve(best.isl[keep].astype(float), (flops / (best.latency * 1e-3))[keep], octaves=1)


def head_sizes(system: str):
    """Rates of heads of other sizes over those of 128, at 2,048 to 8,192 tokens; 192 is left out: inference kernels
    for Blackwell lack it, training's reach what heads of 128 do (arXiv 2603.07685, table 9).
    """
    table = tables(system, "attention/*/*/context_attention_perf")
    full = (table.window_size.fillna(0) == 0) if "window_size" in table else True
    bf16 = (table.attn_dtype == "bfloat16") & (table.kv_cache_dtype == "bfloat16")
    table = table[full & bf16 & (table.num_heads >= 16) & table.isl.between(2048, 8192)]
    best = table.groupby(["head_dim", "batch_size", "isl", "num_heads"]).latency.min().reset_index()
    work = best.batch_size * best.isl.astype(float) ** 2 * best.num_heads * best.head_dim
    rates = (work / best.latency).groupby([best.head_dim, best.isl]).median().unstack()
    shares = (rates / rates.loc[128]).median(axis=1)
    return [(size, float(shares[size])) for size in (64, 128, 256) if size in shares.index]


def collective(table: pd.DataFrame, name: str, bandwidth: float):
    """Start-up seconds of 2 ranks and of each further one, and the share of the link against the bytes sent."""
    table = table[(table.op_name == COLLECTIVES[name]) & (table.nccl_dtype == "half")]
    best = table.groupby(["num_gpus", "message_size"]).latency.min().reset_index()
    start = best[best.message_size == best.message_size.min()].set_index("num_gpus").latency * 1e-3
    ranks = int(best.num_gpus.max())
    per_rank = max(0.0, (start[ranks] - start[2]) / (ranks - 2))
    whole = best[best.num_gpus == ranks]
    sent = whole.message_size * 2.0 * (ranks - 1) / ranks * (2 if name == "all_reduce" else 1)
    moving = whole.latency * 1e-3 - start[ranks]
    clear = moving > 0.5 * start[ranks]
    return start[2] - per_rank, per_rank, ranks, curve(sent[clear], (sent / moving / bandwidth)[clear])


def numbers(values) -> str:
    return "[" + ", ".join(f"{value:.4g}".replace("e+", "e") for value in values) + "]"


def device_file(name: str, system: str, backward: tuple[float, float]) -> str:
    """The curves of one device as TOML."""
    lines, evidence = ["# Written by tools/fit_catalogue.py; edit that, or override a curve in a device file.", ""], {}

    def table(key: str, size, rate, extra: str = "", array: bool = False) -> None:
        lines.extend([f"[[{key}]]" if array else f"[{key}]", *([extra] if extra else [])])
        lines.extend([f"size = {numbers(size)}", f"rate = {numbers(rate)}", ""])

    for precision, kinds in PRECISIONS.items():
        if name == "a100" and precision == "fp8":
            continue
        size, rate, residual = gemm(system, kinds)
        table(f"gemm.{precision}", size, rate)
        evidence[f"gemm.{precision}"] = "GEMM tables, best framework per shape, medians by FLOPs", residual
        worst = 0.0
        for width, (size, rate, residual) in grouped(system, kinds):
            table(f"grouped_gemm.{precision}", size, rate, f"width = {width}", array=True)
            worst = max(worst, residual)
        evidence[f"grouped_gemm.{precision}"] = (
            "fused MoE tables less memory passes, balanced, medians by rows and width",
            worst,
        )
    size, rate, residual = attention(system)
    slowdown = np.interp(np.log2(size), [12, 14], backward) * BACKWARD_CREDIT
    for precision in ("bf16",) if name == "a100" else ("bf16", "fp8"):  # attention stays in bf16 under fp8 recipes
        table(f"attention.{precision}", size, rate)
        table(f"attention_backward.{precision}", size, np.array(rate) * slowdown)
    evidence["attention"] = "context attention tables, bf16, heads of 128, full-square credit", residual
    shares = head_sizes(system)
    table("attention_head_sizes", [head_size for head_size, _ in shares], [share for _, share in shares])
    evidence["attention_head_sizes"] = "context attention tables, heads of other sizes over heads of 128", None
    for key, (what, residual) in evidence.items():
        lines += [
            f'[evidence."{key}"]',
            'kind = "fitted"',
            f'source = "{SOURCE}: {what}"',
            *([f"residual = {residual:.2f}"] if residual is not None else []),
            "",
        ]
    ratio = (
        "assumed 0.8 of the forward rate" if backward == ASSUMED else "backward to forward of arXiv 2603.07685, table 9"
    )
    kind = "assumed" if backward == ASSUMED else "fitted"
    lines += ['[evidence."attention_backward"]', f'kind = "{kind}"', f'source = "{ratio}; 2 forwards of work"', ""]
    return "\n".join(lines)


def collectives_file(name: str, system: str, bandwidth: float) -> str:
    """What NCCL makes of one device's NVLink, as TOML."""
    table, worst = tables(system, "comm/nccl/*/nccl_perf"), 0.0
    lines = ["# Written by tools/fit_catalogue.py. Shares of the link's bandwidth against bytes sent by one rank.", ""]
    for collective_name in COLLECTIVES:
        latency, per_rank, ranks, (size, rate, residual) = collective(table, collective_name, bandwidth)
        worst = max(worst, residual)
        lines += [f"[{collective_name}]", f'latency_seconds = "{latency * 1e6:.3g}us"']
        lines += [f'latency_per_rank_seconds = "{per_rank * 1e6:.3g}us"', f"size = {numbers(size)}"]
        lines += [f"rate = {numbers(rate)}", ""]
    what = f"NCCL tables, {ranks} ranks, best version"
    lines += ["[evidence]", 'kind = "fitted"', f'source = "{SOURCE}: {what}"', f"residual = {worst:.2f}", ""]
    return "\n".join(lines)


def main() -> None:
    for folder in ("curves", "collectives"):
        (CATALOGUE / folder).mkdir(exist_ok=True)
    for name, (system, backward) in DEVICES.items():
        (CATALOGUE / "curves" / f"{name}.toml").write_text(device_file(name, system, backward))
        text = collectives_file(name, system, NVLINK[name])
        (CATALOGUE / "collectives" / f"nccl-{name}.toml").write_text(text)


if __name__ == "__main__":
    main()

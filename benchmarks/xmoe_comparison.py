"""The comparison of Piper (arXiv 2605.05049, figure 13): our plan on Frontier beside X-MoE's mapping and both figures.

python -m benchmarks.xmoe_comparison [--only WORD] [--runtime NAME] [--json FILE]

For X-MoE's four models (arXiv 2508.13337, table 3): the planner's best strategy at the number of GCDs at which Piper's
figure was measured, X-MoE's own mapping at its number, both predicted by the same model, beside the published
TFLOPS/GCD. Published FLOPs are those of the papers; predicted ones count causal attention and no recomputation. What
is not published is assumed: 1,024 sequences a step for all; for Super the mapping of Large.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks.command_line import parser_of, write_json
from pipermoe.planner.candidate import candidate, model_flops
from pipermoe.planner.find import searched
from pipermoe.planner.job import Job
from pipermoe.planner.result import Candidate
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.platform_file import load_platform
from pipermoe.specs.runtimes import RUNTIMES, Choice
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.train import TrainConfig
from pipermoe.specs.units import format_bytes

MACHINE = "frontier"
BATCH = 1024


@dataclass(frozen=True, slots=True)
class Case:
    """Published TFLOPS/GCD of both systems at their numbers of GCDs, and X-MoE's mapping (its repository's scripts)."""

    model: str
    seq_len: int
    gcds: int
    piper: float
    xmoe_gcds: int
    xmoe: float
    mapping: str


CASES = (
    Case("xmoe-small", 2048, 8, 90.44, 256, 44.0, "pp1 dp256 ep8 mbs4 1f1b z1"),
    Case("xmoe-medium", 4096, 32, 57.83, 256, 24.2, "pp1 dp256 ep64 mbs1 1f1b z1"),
    Case("xmoe-large", 4096, 80, 46.89, 256, 24.1, "pp1 dp128 tp2 ep64 mbs1 1f1b z1"),
    Case("xmoe-super", 4096, 512, 36.96, 1024, 10.2, "pp1 dp512 tp2 ep64 mbs1 1f1b z1"),
)


def tflops(job: Job, predicted: Candidate) -> float:
    """Model TFLOPS of one GCD."""
    return model_flops(job.model, job.train) / predicted.step_seconds / job.world_size / 1e12


def compare(case: Case, runtime: Choice) -> dict:
    """One row: the plan, X-MoE's mapping, and both published figures."""
    model, platform = load_model(case.model), load_platform(MACHINE)
    train = TrainConfig(seq_len=case.seq_len, global_batch_size=BATCH, precision="bf16")
    budget = platform.memory_budget_bytes
    mapping = Strategy.parse(case.mapping)
    theirs_job = Job(model, platform, train, case.xmoe_gcds, budget)
    theirs = candidate(theirs_job, mapping)
    field = searched(model, platform, train, case.gcds, headroom=0, runtime=runtime)
    row = {
        "model": case.model,
        "gcds": case.gcds,
        "published_piper": case.piper,
        "xmoe_gcds": case.xmoe_gcds,
        "xmoe_mapping": strategy_text(mapping),
        "xmoe_tflops": tflops(theirs_job, theirs),
        "xmoe_peak_bytes": theirs.peak_bytes,
        "xmoe_fits": theirs.peak_bytes <= budget,
        "published_xmoe": case.xmoe,
    }
    ranking = field.best()
    if not ranking.best:
        return row | {"plan": None}
    chosen = field.space.strategy(ranking.best[0].place)
    ours = candidate(field.job, chosen)
    return row | {"plan": strategy_text(chosen), "tflops": tflops(field.job, ours), "peak_bytes": ours.peak_bytes}


def print_rows(rows: list[dict]) -> None:
    table = Table(box=None, pad_edge=False, title=f"Model TFLOPS per GCD on {MACHINE}", title_justify="left")
    for name in ("model", "GCDs", "our plan", "predicted", "Piper", "GCDs", "X-MoE's mapping", "predicted", "X-MoE"):
        left = name in ("model", "our plan", "X-MoE's mapping")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for row in rows:
        ours = [row["plan"], f"{row['tflops']:.1f}"] if row["plan"] else ["nothing fits", ""]
        fits = "" if row["xmoe_fits"] else f" (needs {format_bytes(row['xmoe_peak_bytes'])})"
        theirs = [str(row["xmoe_gcds"]), row["xmoe_mapping"] + fits, f"{row['xmoe_tflops']:.1f}"]
        published = f"{row['published_piper']:.1f}"
        table.add_row(row["model"], str(row["gcds"]), *ours, published, *theirs, f"{row['published_xmoe']:.1f}")
    Console(width=150).print(table, highlight=False)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--runtime", choices=[*RUNTIMES, "any"], default="pipermoe")
    options = parser.parse_args()
    rows = [compare(case, options.runtime) for case in CASES if options.only in case.model]
    print_rows(rows)
    write_json(options, rows)


if __name__ == "__main__":
    main()

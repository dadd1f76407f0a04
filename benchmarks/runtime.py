"""Tokens per second of the runtime on this machine: the best plan, pure data and expert parallelism, and transformers.

python -m benchmarks.runtime [--platform machine.toml] [--steps 7] [--minutes 6] [--json FILE]

One model, one text, one start, 4 ranks: (a) the strategy that the planner finds, (b) data parallelism alone, (c) expert
parallelism alone, (d) the same weights in transformers under torch's DistributedDataParallel (left out where
`make test-counts` has not made its environment). All train in turn, pass after pass, so that what else the machine does
meets all of them; ratios are of one pass, their median is printed. Equal losses say that they train the same model. As
many passes run as end within the minutes, one at least. How much of all-to-alls and reductions is hidden
comes first (benchmarks/overlap.py). Without a platform this machine is measured.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import overlap
from benchmarks.command_line import parser_of, write_json
from pipermoe.data.batches import load_text
from pipermoe.measure import measure_platform
from pipermoe.planner import find_plan
from pipermoe.planner.given import plan_given
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.configuration import Configuration
from pipermoe.specs.documents import load
from pipermoe.specs.model import MixtureOfExperts, ModelSpec
from pipermoe.specs.plan import Plan
from pipermoe.specs.platform_file import load_platform
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.train import TrainConfig
from pipermoe.specs.units import GIB, format_seconds
from pipermoe.training.launch import launch
from pipermoe.training.learning_rate import learning_rate
from pipermoe.training.measurement import measured_steps
from pipermoe.training.run import Run

RANKS = 4
PURE = {"data parallel": "pp1 dp4 ep1 edp4 mbs4 1f1b z0", "expert parallel": "pp1 dp4 ep4 mbs4 1f1b z0"}
PLANNED, DDP = "best plan", "transformers, DDP"
TRANSFORMERS = Path(".venv-counts/bin/python")
SCRIPT = Path(__file__).with_name("transformers_ddp.py")


def run_plan(plan: Plan, steps: int, weights: Path | None) -> dict:
    """Seconds of the measured steps and all losses of one run."""
    with tempfile.TemporaryDirectory(prefix="pipermoe-runtime-") as folder:
        measurement = launch(plan, Run(Path(folder), steps=steps, weights=weights, quiet=True))
    assert measurement is not None
    return {"seconds": list(measurement.step_seconds), "losses": list(measurement.losses)}


def run_transformers(python: Path, folder: Path, steps: int) -> dict:
    """The same of transformers, from the same steps."""
    text = subprocess.run([python, SCRIPT, "train", folder], check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(text.splitlines()[-1])
    measured = measured_steps(0, steps)
    return {"seconds": found["seconds"][measured.start : measured.stop], "losses": found["losses"]}


def write_job(folder: Path, model: ModelSpec, train: TrainConfig, steps: int) -> None:
    """What transformers is to do: the steps' tokens and rates, and the optimizer's constants."""
    data, config = load_text(train, model.vocab_size), train.optimizer
    np.save(folder / "tokens.npy", np.stack([data.train[data.training_numbers(step)] for step in range(steps)]))
    job = {
        "ranks": RANKS,
        "experts": "grouped_mm",
        "rates": [learning_rate(step, config, train.steps) for step in range(steps)],
        "betas": (config.beta1, config.beta2),
        "epsilon": config.epsilon,
        "weight_decay": config.weight_decay,
        "gradient_clip": config.gradient_clip,
    }
    (folder / "job.json").write_text(json.dumps(job))


def demo_model() -> ModelSpec:
    """The demo's model without what no class of transformers has beside its attention: the shared expert."""
    model = load_model("tiny-moe")
    assert isinstance(model.moe, MixtureOfExperts)
    return model.model_copy(update={"moe": model.moe.model_copy(update={"shared_width": 0})})


def passes_within(seconds: float, ways: dict[str, Callable[[], dict]]) -> dict[str, list[dict]]:
    """What every way gives, all of them once per pass, for as many passes as end in time, one at least."""
    started, longest = time.perf_counter(), 0.0
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    while not longest or time.perf_counter() - started + longest < seconds:
        before = time.perf_counter()
        for name, run in ways.items():
            runs[name].append(run())
        longest = max(longest, time.perf_counter() - before)
    return runs


def summary_of(runs: dict[str, list[dict]], plans: dict[str, Plan], train: TrainConfig) -> list[dict]:
    """For every way its step beside its own prediction, its tokens per second, and the median over passes of what it
    makes of the best plan's.
    """
    typical = {name: [median(each["seconds"]) for each in passes] for name, passes in runs.items()}
    return [
        {
            "way": name,
            "strategy": strategy_text(plans[name].strategy) if name in plans else None,
            "predicted_seconds": plans[name].prediction.step_seconds if name in plans else None,
            "measured_seconds": median(seconds),
            "tokens_per_second": train.tokens_per_step / median(seconds),
            "of_best_plan": median(best / own for best, own in zip(typical[PLANNED], seconds, strict=True)),
            "passes": [best / own for best, own in zip(typical[PLANNED], seconds, strict=True)],
            "losses": runs[name][0]["losses"],
        }
        for name, seconds in typical.items()
    ]


def table_of(rows: list[dict]) -> Table:
    table = Table(title=f"Training throughput, {RANKS} ranks", title_justify="left")
    for name in ("way", "strategy", "predicted", "step", "tokens/s", "of the best plan", "passes", "last loss"):
        table.add_column(name, justify="left" if name in ("way", "strategy") else "right", no_wrap=True)
    for row in rows:
        least, most = min(row["passes"]), max(row["passes"])
        table.add_row(
            row["way"],
            row["strategy"] or "",
            format_seconds(row["predicted_seconds"]) if row["predicted_seconds"] else "",
            format_seconds(row["measured_seconds"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['of_best_plan']:.2f}",
            f"{least:.2f} to {most:.2f}",
            f"{row['losses'][-1]:.5f}",
        )
    return table


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--platform", help="a machine of the catalogue or a platform file")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--transformers", type=Path, default=TRANSFORMERS, help="a Python that has it")
    options = parser.parse_args()
    started, console = time.perf_counter(), Console(width=150)
    hidden = [overlap.row_of(text, each) for text in overlap.STRATEGIES for each in overlap.BANDWIDTHS]
    console.print(overlap.table_of(hidden))
    console.print(overlap.reduction_table([overlap.reduction_row(text) for text in overlap.REDUCING]))
    with tempfile.TemporaryDirectory(prefix="pipermoe-runtime-") as name:
        folder, weights = Path(name), None
        if compares := options.transformers.is_file():
            subprocess.run([options.transformers, SCRIPT, "make", folder], check=True)
            weights = folder / "model"
        model = ModelSpec.from_hf_config(weights) if weights else demo_model()
        job = files("pipermoe.catalogue").joinpath("jobs/demo.toml")
        train = load(str(job), TrainConfig).model_copy(update={"validation_batches": 1, "auxiliary_loss": 0.0})
        write_job(folder, model, train, options.steps)
        platform = load_platform(options.platform) if options.platform else measure_platform(nproc=RANKS, model=model)
        assert platform is not None  # no one else has started these ranks
        best = find_plan(model, platform, train, world_size=RANKS, memory_budget_bytes=GIB).plan
        plans = {PLANNED: best}
        for way, text in PURE.items():
            given = Configuration(model=model, train=train, strategy=Strategy.parse(text))
            plans[way] = plan_given(given, platform, memory_budget_bytes=GIB)
        ways = {way: partial(run_plan, plan, options.steps, weights) for way, plan in plans.items()}
        if compares:
            ways[DDP] = partial(run_transformers, options.transformers, folder, options.steps)
        runs = passes_within(60 * options.minutes - (time.perf_counter() - started), ways)
    rows = summary_of(runs, plans, train)
    console.print(table_of(rows))
    write_json(options, {"torch": torch.__version__, "throughput": rows, "hidden": hidden})


if __name__ == "__main__":
    main()

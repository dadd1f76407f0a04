"""How fast the planner judges: strategies per second of CPU time, and what becomes of the space of three large jobs.

    python -m benchmarks.planner [--json FILE]

CPU seconds of this process, on one core. "judged" is memory and bound of a million rows at once; "search" enumerates,
weighs, bounds and simulates the finalists.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from pipermoe.planner.job import Job
from pipermoe.planner.search import Field
from pipermoe.resources.evaluate import evaluate
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.platform_file import load_platform
from pipermoe.specs.train import TrainConfig

JOBS = (
    ("mixtral-8x22b", "dgx-h100", 128, 1024),
    ("deepseek-v3", "dgx-h100", 2048, 15360),
    ("piper-1.7t", "frontier", 1024, 1024),
)
ROWS = 1_000_000


def judged_per_second(field: Field) -> float:
    """Rows per CPU second of memory and bound together: a million drawn from the space, which has fewer."""
    job, space = field.job, field.space
    places = space.places(np.arange(len(space.heads)), space.select())
    table = space.table(np.random.default_rng(0).choice(places, ROWS))
    evaluate(job.model, job.platform, job.train, table.take(np.arange(1)))
    started = time.process_time()
    evaluate(job.model, job.platform, job.train, table)
    return ROWS / (time.process_time() - started)


def searched(model: str, platform: str, ranks: int, batch: int) -> dict:
    machine = load_platform(platform)
    train = TrainConfig(seq_len=4096, global_batch_size=batch, precision="bf16")
    started = time.process_time()
    field = Field.of(Job(load_model(model), machine, train, ranks, machine.memory_budget_bytes))
    ranking = field.best(8)
    seconds = time.process_time() - started
    return {
        "job": f"{model} on {ranks} {platform}",
        "considered": field.space.considered,
        "not_fitting": ranking.not_fitting,
        "pruned": ranking.pruned,
        "simulated": ranking.simulated,
        "cpu_seconds": seconds,
        "considered_per_second": field.space.considered / seconds,
        "judged_per_second": judged_per_second(field),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    output = parser.parse_args().json
    results = []
    for case in JOBS:
        results.append(searched(*case))
        print("  ".join(f"{k} {v:,.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in results[-1].items()))
    if output:
        output.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

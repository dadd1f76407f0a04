"""How fast the planner searches: what becomes of the space of three large jobs, in CPU seconds of one core.

    python -m benchmarks.planner [--only WORD] [--runtime NAME] [--json FILE]

From the axes to the proven best strategy, the simulations of the proof included; reading files is not.
"""

from __future__ import annotations

import time

from benchmarks.command_line import parser_of, write_json
from pipermoe.planner.job import Job
from pipermoe.planner.search import Field
from pipermoe.specs.catalogue import load_model
from pipermoe.specs.platform_file import load_platform
from pipermoe.specs.runtimes import RUNTIMES, Choice, executed_by
from pipermoe.specs.strategy_text import strategy_text
from pipermoe.specs.train import TrainConfig

JOBS = (
    ("mixtral-8x22b", "dgx-h100", 128, 1024),
    ("deepseek-v3", "dgx-h100", 2048, 15360),
    ("piper-1.7t", "frontier", 1024, 1024),
)


def searched(model: str, platform: str, ranks: int, batch: int, runtime: Choice) -> dict:
    machine, spec = load_platform(platform), load_model(model)
    train = TrainConfig(seq_len=4096, global_batch_size=batch, precision="bf16")
    runtimes = executed_by(runtime, spec, train)
    job = Job(spec, machine, train, ranks, machine.memory_budget_bytes, runtimes=runtimes)
    started = time.process_time()
    field = Field.of(job)
    bounded = time.process_time()
    ranking = field.best()
    seconds = time.process_time() - started
    space, [best] = field.space, ranking.best
    return {
        "job": f"{model} on {ranks} {platform}, {runtime}",
        "considered": space.considered,
        "illegal": space.illegal,
        "redundant": space.redundant,
        "not_fitting": ranking.not_fitting,
        "pruned": ranking.pruned,
        "simulated": ranking.simulated,
        "bounding_seconds": bounded - started,
        "cpu_seconds": seconds,
        "strategies_per_second": space.considered / seconds,
        "best": strategy_text(space.strategy(best.place)),
        "step_seconds": best.seconds,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--runtime", choices=[*RUNTIMES, "any"], default="pipermoe")
    options = parser.parse_args()
    results = []
    for case in JOBS:
        if options.only in case[0]:
            results.append(searched(*case, options.runtime))
            print("\n".join(f"{key:22} {_text(value)}" for key, value in results[-1].items()), end="\n\n")
    write_json(options, results)


def _text(value: str | int | float) -> str:
    return value if isinstance(value, str) else f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    main()

"""What would help: the chosen strategy with one thing changed, predicted anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pipermoe.planner.diagnosis import OVERLAP
from pipermoe.planner.exact import exact_seconds
from pipermoe.planner.job import Job
from pipermoe.planner.other_machines import with_network
from pipermoe.planner.result import Candidate, WhatIf
from pipermoe.resources.peak import peak_bytes
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.units import option_bytes

IMBALANCES = (1.0, 1.3, 2.0)
MORE_MEMORY = 1.25


def what_ifs(job: Job, chosen: Candidate, roomier: Strategy | None = None) -> tuple[WhatIf, ...]:
    """Network, memory, overlap, routing, batch, number format. `roomier` is the best with a quarter more memory."""

    def ask(name: str, changed: Job, strategy: Strategy = chosen.strategy, way: str = "") -> WhatIf:
        seconds = exact_seconds(changed, strategy)
        speed = changed.train.tokens_per_step / seconds
        table = StrategyTable.of([strategy])
        peak = int(peak_bytes(changed.model, changed.train, table, imbalance=changed.imbalance)[0])
        return WhatIf(
            name=name,
            step_seconds=seconds,
            gain=speed / chosen.tokens_per_second - 1,
            peak_bytes=peak,
            fits=peak <= changed.memory_budget_bytes,
            strategy=strategy if strategy != chosen.strategy else None,
            way=way,
        )

    def answers() -> Iterator[WhatIf]:
        network = with_network(job.platform, bandwidth=2.0, latency=0.5)
        yield ask("network twice as fast", replace(job, platform=network))
        if roomier is not None:
            more = replace(job, memory_bytes=int(job.memory_bytes * MORE_MEMORY))
            yield ask("a quarter more memory", more, roomier, f"--memory {option_bytes(more.memory_bytes)}")
        if chosen.strategy.schedule.endswith(OVERLAP):
            plain = chosen.strategy.schedule.removesuffix(OVERLAP)
            yield ask("no overlap", job, chosen.strategy.model_copy(update={"schedule": plain}))
        for imbalance in IMBALANCES:
            if imbalance != job.imbalance:
                way = "pipermoe balance" if imbalance < job.imbalance else f"--imbalance {imbalance:g}"
                yield ask(f"routing imbalance {imbalance:g}", replace(job, imbalance=imbalance), way=way)
        batch = 2 * job.train.global_batch_size
        larger = job.train.model_copy(update={"global_batch_size": batch})
        yield ask("twice the global batch", replace(job, train=larger), way=f"--global-batch {batch}")
        if "fp8" in job.platform.device.gemm and job.train.precision == "bf16":
            fp8 = job.train.model_copy(update={"precision": "fp8"})
            yield ask("products in fp8", replace(job, train=fp8), way="--precision fp8 (other numerics)")

    return tuple(answers())

"""What a step is up against: the seconds of each wall, and the paper's four bottlenecks as they stand in this plan.

The four (Piper, arXiv 2605.05049, section 1): all-to-all latency at scale, overlap that does not hide it, expert
products too small for the device, and a strategy that does not know the machine. Each is measured by taking it away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from pipermoe.planner.exact import exact_seconds
from pipermoe.planner.job import Job
from pipermoe.planner.other_machines import with_flat_network, with_network
from pipermoe.planner.result import Candidate, Finding, Wall
from pipermoe.planner.search import ROUNDING
from pipermoe.resources.activations.sizes import sizes_of
from pipermoe.resources.compute import expert_work
from pipermoe.resources.parts import PARTS
from pipermoe.resources.peak import peak_bytes
from pipermoe.resources.rates import grouped_rate_at, known
from pipermoe.resources.step import step_costs
from pipermoe.schedule.builders import illegal
from pipermoe.specs.report import TERMS
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.strategy_table import StrategyTable
from pipermoe.specs.units import format_bytes, format_seconds

OVERLAP = "-overlap"
COMMUNICATION = ("all_to_all", "gradient_sync")


def walls(parts: dict[str, float], chosen: Candidate, unlimited_seconds: float) -> dict[Wall, float]:
    """Mean seconds of a rank behind each wall; "memory": what the fastest strategy would save that does not fit."""
    elsewhere = {*COMMUNICATION, "pipeline_wait", "imbalance", "host"}
    return {
        "compute": sum(parts[name] for name in (*PARTS, *TERMS) if name in parts and name not in elsewhere),
        "communication": sum(parts[name] for name in COMMUNICATION),
        "bubble": parts["pipeline_wait"],
        "memory": max(0.0, chosen.step_seconds - unlimited_seconds),
        "imbalance": parts["imbalance"],
        "host": parts["host"],
    }


def findings(job: Job, chosen: Candidate, blind: Strategy | None = None) -> tuple[Finding, ...]:
    """The four bottlenecks; `blind` is the strategy that would be best if the network were flat."""
    found = [*_latency(job, chosen), *_overlap(job, chosen), *_skinny_products(job, chosen)]
    return (*found, *(_blindness(job, chosen, blind) if blind else ()))


def _latency(job: Job, chosen: Candidate) -> Iterator[Finding]:
    if chosen.strategy.expert_parallel == 1:
        return
    quiet = replace(job, platform=with_network(job.platform, latency=0.0))
    saved = chosen.step_seconds - exact_seconds(quiet, chosen.strategy)
    spent = chosen.seconds["all_to_all"]
    sentence = (
        f"{format_seconds(spent)} exposed among {chosen.strategy.expert_parallel} ranks; "
        f"without start-up times the step takes {format_seconds(saved)} less"
    )
    yield Finding(name="all-to-all latency", sentence=sentence, seconds=saved)


def _overlap(job: Job, chosen: Candidate) -> Iterator[Finding]:
    """How much of the all-to-alls is exposed, and what hiding them behind computing would save at most."""
    strategy = chosen.strategy
    table = StrategyTable.of([strategy])
    costs = step_costs(job.model, job.platform, job.train, table, job.imbalance)
    waited, carried = costs.forward_exchange + costs.backward_exchange, costs.forward_carried + costs.backward_carried
    everything = chosen.microbatches * float(np.sum(waited + carried / job.platform.host.rank_share))
    everything /= strategy.pipeline_parallel
    if not everything:
        return
    exposed = chosen.seconds["all_to_all"]
    saved, how = _with_overlap(job, chosen) if not strategy.schedule.endswith(OVERLAP) else (0.0, "")
    sentence = f"{exposed / everything:.0%} of {format_seconds(everything)} of all-to-alls is exposed{how}"
    yield Finding(name="insufficient overlap", sentence=sentence, seconds=saved)


def _with_overlap(job: Job, chosen: Candidate) -> tuple[float, str]:
    name, strategy = chosen.strategy.schedule + OVERLAP, chosen.strategy
    if illegal(name, strategy.pipeline_parallel, chosen.microbatches, strategy.virtual_stages):
        return 0.0, ""
    overlapped = strategy.model_copy(update={"schedule": name})
    saved = chosen.step_seconds - exact_seconds(job, overlapped)
    peak = peak_bytes(job.model, job.train, StrategyTable.of([overlapped]), imbalance=job.imbalance)[0]
    lack = peak - job.memory_budget_bytes
    but = f", but {format_bytes(lack)} too much memory" if lack > 0 else ""
    return saved, f"; {name} takes {format_seconds(abs(saved))} {'less' if saved > 0 else 'more'}{but}"


def _skinny_products(job: Job, chosen: Candidate) -> Iterator[Finding]:
    """The rate of the experts' products beside that of the fastest dense product."""
    table = StrategyTable.of([chosen.strategy])
    device, precision = job.platform.device, job.train.precision
    sizes = sizes_of(job.model, job.train, table, imbalance=job.imbalance)
    first = expert_work(sizes)[0]
    rows, width = (float(np.ravel(size)[0]) for size in (first.rows_per_expert, first.width))
    rate = float(grouped_rate_at(known(device, "grouped_gemm", precision), rows, width))
    best = max(known(device, "gemm", precision).rate)
    sentence = f"an expert gets {rows:,.0f} rows of width {width:,.0f}: {rate / best:.0%} of the best dense rate"
    yield Finding(name="skinny expert products", sentence=sentence, seconds=0.0)


def _blindness(job: Job, chosen: Candidate, blind: Strategy) -> Iterator[Finding]:
    saved = exact_seconds(job, blind) - chosen.step_seconds
    if blind == chosen.strategy:
        sentence = "none: on a flat network the same strategy would be best"
    elif saved <= ROUNDING * chosen.step_seconds:
        sentence = f"none: on a flat network {blind.compact()} would be best, and it is as fast here"
    else:
        sentence = f"on a flat network {blind.compact()} would be best; here it takes {format_seconds(saved)} more"
    yield Finding(name="platform-blind strategy", sentence=sentence, seconds=max(0.0, saved))


def flat(job: Job) -> Job:
    """The same job where every rank is as near as the nearest."""
    return replace(job, platform=with_flat_network(job.platform))

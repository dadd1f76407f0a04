"""What moving experts wins and costs in training, under a router that stays skewed, on this machine's CPU.

python -m benchmarks.balance_training [--ranks 2] [--steps 24] [--json FILE]

Every step is trained in turn with experts where they are and by each mechanism, in the same processes, so that what
else the machine does meets all of them. Ratios are of one step, their median is printed: of the step's seconds, and of
the CPU seconds of the busiest rank's own thread, which is what a step takes where every rank has cores of its own.
Below: the share of choices that experts drop, whose capacity is their even share, with copies in proportion to the load
(SwiftMoE) and without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from tests.distributed.harness import run_ranks
from torch import Tensor

from benchmarks.command_line import parser_of, write_json
from pipermoe.layout.expert_layout import ExpertLayout
from pipermoe.layout.load import imbalance, rank_load
from pipermoe.layout.policy import Nodes
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.layout.lay_out import LaidOut, spill_rule
from pipermoe.runtime.optimizer.adamw import Optimizer
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.runtime.step import training_step
from pipermoe.schedule.builders import schedule_of
from pipermoe.schedule.communication import with_communication
from pipermoe.specs.model import GroupedQueryAttention, MixtureOfExperts, ModelSpec, Router
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import Balance, TrainConfig
from pipermoe.training.balancing.balance_line import BalanceLine
from pipermoe.training.balancing.balancer import Balancer
from pipermoe.training.metrics import take_census

MODEL = ModelSpec(
    name="skewed",
    vocab_size=256,
    hidden_size=128,
    num_layers=2,
    attention=GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=32),
    moe=MixtureOfExperts(
        num_experts=16, top_k=2, expert_width=256, router=Router(score="sigmoid", correction_bias="buffer")
    ),
)
JOB = TrainConfig(seq_len=256, global_batch_size=32, auxiliary_loss=0.0, balance_rate=0.0)
MICRO_BATCH = 8
SKEW = 0.06  # spread of the biases that skew the choices, the most popular expert first: the first rank is the busiest
SPARE_SLOTS = 2
WARM_UP = 4  # steps that are not timed, in which the first layout is found
STATIC = "static"
WAYS = {
    STATIC: Balance(),
    **{
        mechanism: Balance(
            policy="balanced", mechanism=mechanism, spare_slots=SPARE_SLOTS, every_steps=2, threshold=1.05
        )
        for mechanism in ("bound", "decoupled", "sparse")
    },
    "spill": Balance(spill_above=1.05),
}
CAPPED = {
    STATIC: Balance(),
    "proportional": Balance(policy="proportional", spare_slots=SPARE_SLOTS, every_steps=1, threshold=1.0),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One step of one rank."""

    wall_seconds: float
    cpu_seconds: float
    move_seconds: float
    imbalance: float
    dropped: float


class Way:
    """A training of its own, step by step."""

    def __init__(self, balance: Balance, job: TrainConfig, groups: ProcessGroups, strategy: Strategy) -> None:
        ranks, experts = groups.ep.size(), MODEL.moe.num_experts
        layout = ExpertLayout.static(MODEL.num_layers, ranks, experts, experts // ranks + balance.spare_slots)
        mechanism = balance.mechanism if balance.moves else None
        laid_out = LaidOut(layout, mechanism, Nodes(ranks, ranks), spill_rule(balance)) if balance.lays_out else None
        schedule = with_communication(schedule_of(strategy, job.global_batch_size))
        self.job, self.groups, self._still = job, groups, layout
        self.engine = Engine(MODEL, job, strategy, schedule, groups, laid_out=laid_out)
        for name, bias in self.engine.correction_biases():
            drawn = torch.randn(bias.shape, generator=torch.Generator().manual_seed(sum(name.encode())))
            bias.copy_(SKEW * drawn.sort(descending=True).values)
        self.optimizer = Optimizer(self.engine.flats, job.optimizer)
        self.balancer = Balancer(balance, self.engine, self.optimizer) if balance.moves else None

    def step(self, step: int) -> Sample:
        engine, meter = self.engine, self.engine.meter
        dropped = 0.0

        def agree(totals: Tensor) -> float:
            nonlocal dropped
            dropped = totals[-1].item()
            return math.sqrt(totals[0].item())

        batch = tokens_of(step, self.job).view(-1, MICRO_BATCH, self.job.seq_len + 1).chunk(self.groups.dp.size())
        meter.reset()
        dist.barrier()
        wall, cpu = time.perf_counter(), time.thread_time()
        move = self.balancer.move if self.balancer else None
        training_step(engine, self.optimizer, batch[self.groups.dp.rank()], agree, 1e-4, move)
        cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
        census = take_census(engine, self.groups)
        load = imbalance(rank_load(self._still, census.load_LE)) if census.rank_load is None else census.rank_load
        moved = 0.0
        if self.balancer is not None:
            computing = meter.seconds["forward"] + meter.seconds["backward"]
            line = BalanceLine(tuple(load), census.spilled)
            moved = self.balancer.observe(step + 1, census.load_LE, computing, line).move_seconds
        return Sample(wall, cpu, moved, float(np.mean(load)), dropped)


def tokens_of(step: int, job: TrainConfig) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(MODEL.vocab_size, (job.global_batch_size, job.seq_len + 1), generator=generator)


def run(rank: int, ways: dict[str, Balance], job: TrainConfig, steps: int) -> dict[str, list[Sample]]:
    ranks = dist.get_world_size()
    strategy = Strategy(data_parallel=ranks, expert_parallel=ranks, micro_batch_size=MICRO_BATCH)
    groups = ProcessGroups.create(strategy)
    trainings = {name: Way(balance, job, groups, strategy) for name, balance in ways.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    for step in range(WARM_UP + steps):
        for name, training in trainings.items():
            samples[name].append(training.step(step))
    return samples


def row_of(name: str, ranks: Sequence[dict[str, list[Sample]]]) -> dict[str, float | str]:
    """Medians and means of the steps after the warm-up; moves of all steps, those to the first layout included."""

    def all_steps(name: str, field: str) -> list[float]:
        steps = zip(*(rank[name] for rank in ranks), strict=True)
        return [max(getattr(sample, field) for sample in step) for step in steps]

    def worst(name: str, field: str) -> list[float]:
        return all_steps(name, field)[WARM_UP:]

    def ratio(field: str) -> float:
        pairs = zip(worst(name, field), worst(STATIC, field), strict=True)
        return median(mine / static for mine, static in pairs)

    seconds = worst(name, "wall_seconds")
    return {
        "way": name,
        "imbalance": float(np.mean(worst(name, "imbalance"))),
        "seconds": median(seconds),
        "seconds_ratio": ratio("wall_seconds"),
        "cpu_ratio": ratio("cpu_seconds"),
        "move_share": sum(all_steps(name, "move_seconds")) / sum(all_steps(name, "wall_seconds")),
        "dropped": float(np.mean(worst(name, "dropped"))),
    }


def table_of(title: str, rows: Sequence[dict], columns: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("way", *columns):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        table.add_row(row["way"], *(format(row[key], form) for key, form in columns.items()))
    return table


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    capped = JOB.model_copy(update={"capacity_factor": 1.0})
    moved = run_ranks(run, options.ranks, WAYS, JOB, options.steps, timeout=3000)
    dropping = run_ranks(run, options.ranks, CAPPED, capped, max(options.steps // 4, 4), timeout=3000)
    rows = [row_of(name, moved) for name in WAYS]
    drops = [row_of(name, dropping) for name in CAPPED]
    console = Console(width=130)
    times = {"imbalance": ".3f", "seconds": ".3f", "seconds_ratio": ".3f", "cpu_ratio": ".3f", "move_share": ".2%"}
    console.print(table_of("Experts that move", rows, times))
    console.print(table_of("Choices dropped at capacity factor 1", drops, {"imbalance": ".3f", "dropped": ".1%"}))
    write_json(options, {"torch": torch.__version__, "ranks": options.ranks, "moving": rows, "capped": drops})


if __name__ == "__main__":
    main()

"""How much communication hides behind computing, on a clock that counts FLOPs: exact, and the same on any machine.

python -m benchmarks.overlap

Ranks of a small model run one step of each schedule over an emulated link, with its overlap and without. The timeline,
given the durations of the serial run, says how much of the waiting for all-to-alls can be hidden; the first table says
how much was. The second: how much of reducing gradients, over a link of its own, is over when computing is.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from tests.distributed.harness import run_ranks
from torch import Tensor

from pipermoe.runtime.counters import FlopCounter
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.optimizer.flat_parameters import FlatParameters, Landed
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.runtime.pipeline.flight import Collective, Transport, Work
from pipermoe.schedule.action import Schedule
from pipermoe.schedule.builders import schedule_of
from pipermoe.schedule.communication import with_communication
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.timeline import simulate
from pipermoe.specs.model import GroupedQueryAttention, MixtureOfExperts, ModelSpec
from pipermoe.specs.strategy import Strategy
from pipermoe.specs.train import TrainConfig

FLOPS_PER_SECOND = 1e9
MODEL = ModelSpec(
    name="overlap",
    vocab_size=64,
    hidden_size=32,
    num_layers=4,
    attention=GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8),
    moe=MixtureOfExperts(num_experts=8, top_k=2, expert_width=32),
)
TRAIN = TrainConfig(seq_len=32, global_batch_size=16, auxiliary_loss=0.0)
STRATEGIES = (
    "pp2 dp2 ep2 1f1b-overlap",
    "pp2 dp2 ep2 zb-h1-overlap",
    "pp2 vpp2 dp2 ep2 interleaved-1f1b-overlap",
    "pp2 vpp2 dp2 ep2 dualpipe-v",
)
REDUCING = ("dp2 1f1b", "pp2 dp2 1f1b", "pp2 dp2 zb-h1", "pp2 vpp2 dp2 dualpipe-v")
REDUCTION_SHARES = (0.05, 0.1, 0.25)  # of a step's computing
BANDWIDTHS = (2e7, 1.2e7)  # bytes/s beside 1e9 FLOP/s: all-to-alls take a third as long as computing, or more than half


class FlopClock(FlopCounter):
    """Time that passes with FLOPs, and while something is waited for; both also by action."""

    def __init__(self) -> None:
        super().__init__()
        self.meter: Meter | None = None
        self.seconds = 0.0
        self.computing: dict[str, float] = defaultdict(float)
        self.waiting: dict[str, float] = defaultdict(float)

    def add(self, flops: int, operands: object) -> None:
        assert self.meter is not None
        self.seconds += flops / FLOPS_PER_SECOND
        self.computing[str(self.meter.action)] += flops / FLOPS_PER_SECOND

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        assert self.meter is not None
        self.seconds += seconds
        self.waiting[str(self.meter.action)] += seconds


class EmulatedLink:
    """A `Transport` that carries what `transport` does, one all-to-all after the other, each for (bytes that leave the
    rank) / bandwidth. On a CPU moving bytes costs the cores that compute; this needs none, like a network card.

    `wait` holds until then. `now` and `sleep` are a clock, in seconds.
    """

    def __init__(
        self,
        transport: Transport,
        rank: int,
        bytes_per_second: float,
        *,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._transport, self._rank, self._bandwidth = transport, rank, bytes_per_second
        self.now, self.sleep = now, sleep
        self._free = 0.0

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_rows: Sequence[int] | None, sent_rows: Sequence[int] | None
    ) -> Work:
        work = self._transport.all_to_all(received, sent, received_rows, sent_rows)
        seconds = 0.0
        if sent_rows is not None:  # routing counts, which have even parts, are too few to take time
            leaving = sum(sent_rows) - sent_rows[self._rank]
            seconds = leaving * sent[:1].numel() * sent.element_size() / self._bandwidth
        self._free = max(self.now(), self._free) + seconds
        return _Held(self, work, self._free)


class _Held:
    """A transfer that has not arrived before `until`, whatever the carrier says."""

    def __init__(self, link: EmulatedLink, work: Work, until: float):
        self._link, self._work, self._until = link, work, until

    def is_completed(self) -> bool:
        return self._link.now() >= self._until

    def wait(self) -> None:
        self._work.wait()
        seconds = self._until - self._link.now()
        if seconds > 0:
            self._link.sleep(seconds)


@dataclass(frozen=True, slots=True)
class Observed:
    """What one rank of pipeline rank `place` computed, and waited for all-to-alls, in every action: seconds."""

    place: int
    computing: dict[str, float]
    waiting: dict[str, float]

    @property
    def waited(self) -> float:
        return sum(self.waiting.values())


def lowered(strategy: Strategy, train: TrainConfig, *, apart: bool = False) -> Schedule:
    """The strategy's schedule with its messages; `apart` takes pairs apart."""
    schedule = with_communication(schedule_of(strategy, train.global_batch_size))
    if not apart:
        return schedule
    return replace(schedule, ranks=tuple(tuple(schedule.parts(rank)) for rank in range(schedule.num_ranks)))


def step_over_link(
    model: ModelSpec, train: TrainConfig, strategy: Strategy, bandwidth: float, batch: Tensor, *, serial: bool
) -> tuple[Engine, Tensor, Observed]:
    """One step of this rank with balanced routing: its engine, its share of the loss, what took how long. Collective.

    `serial` takes pairs apart and lets weight gradients wait for their turn.
    """
    groups, clock, experts = ProcessGroups.create(strategy), FlopClock(), model.moe.num_experts
    rows = strategy.micro_batch_size * train.seq_len * model.moe.top_k // experts
    link = EmulatedLink(Collective(groups.ep), groups.ep.rank(), bandwidth, now=clock.now, sleep=clock.sleep)
    counts = [[rows] * experts] * strategy.expert_parallel
    schedule = lowered(strategy, train, apart=serial)
    engine = Engine(model, train, strategy, schedule, groups, transport=link, planned_counts=counts)
    clock.meter = engine.meter
    if serial:
        engine.meter.on_release = lambda tensor: None  # as if counted
    with clock:
        loss = engine.step(batch).loss
    return engine, loss, Observed(groups.coordinates.pp, dict(clock.computing), dict(clock.waiting))


def durations_of(serial: Iterable[Observed], schedule: Schedule) -> Durations:
    """What every kind of action took in a serial run; all micro-batches are alike."""

    def of(what: str, kind: str) -> list[float]:
        found = [0.0] * schedule.num_stages
        for rank in serial:
            for stage in schedule.stages_of(rank.place):
                found[stage] = getattr(rank, what).get(f"{stage}{kind}1", 0.0)
        return found

    inputs, whole = of("waiting", "I"), of("waiting", "B")
    return Durations(
        forward=of("computing", "F"),
        backward=of("computing", "B"),
        input_grad=of("computing", "I"),
        weight_grad=of("computing", "W"),
        forward_exchange=of("waiting", "F"),
        backward_exchange=[max(pair) for pair in zip(inputs, whole, strict=True)],
    )


def can_hide(serial: list[Observed], schedule: Schedule) -> list[float]:
    """Seconds of waiting that each rank of a serial run need not wait, says the timeline."""
    exposed = simulate(schedule, durations_of(serial, schedule)).exchange_seconds
    return [rank.waited - exposed[rank.place] for rank in serial]


def batch_of(rank: int, strategy: Strategy) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    shape = (-1, strategy.micro_batch_size, TRAIN.seq_len + 1)
    tokens = torch.randint(MODEL.vocab_size, (TRAIN.global_batch_size, TRAIN.seq_len + 1), generator=generator)
    return tokens.view(shape).chunk(strategy.data_parallel)[0]


def observe(rank: int, text: str, bandwidth: float, serial: bool) -> Observed:
    strategy = Strategy.parse(text)
    return step_over_link(MODEL, TRAIN, strategy, bandwidth, batch_of(rank, strategy), serial=serial)[2]


@dataclass(frozen=True, slots=True)
class Reductions:
    """When one rank launched each reduction of its gradients and of how many bytes, and when it had computed all."""

    launched: list[tuple[float, int]]
    computed: float

    def hidden(self, share: float) -> float:
        """The share of the reductions that is over by then, one after the other, if all take `share` of computing."""
        seconds = share * self.computed
        per_byte = seconds / sum(size for _, size in self.launched)
        free = 0.0
        for start, size in self.launched:
            free = max(free, start) + size * per_byte
        return 1 - max(0.0, free - self.computed) / seconds


def observe_reductions(rank: int, text: str) -> Reductions:
    strategy, clock = Strategy.parse(text), FlopClock()
    groups, launched, launch = ProcessGroups.create(strategy), [], FlatParameters.launch_reduction
    engine = Engine(MODEL, TRAIN, strategy, lowered(strategy, TRAIN), groups)
    clock.meter = engine.meter

    def noted(flat: FlatParameters, *landed: Landed) -> None:
        launched.append((clock.seconds, flat.gradients.nbytes))
        launch(flat, *landed)

    with mock.patch.object(FlatParameters, "launch_reduction", noted), clock:
        engine.step(batch_of(rank, strategy))
    for flat in engine.flats:
        flat.reduce_gradients()
    return Reductions(launched, clock.seconds)


def reduction_row(text: str) -> dict:
    """The least that any rank of this strategy hides, for every share."""
    ranks = run_ranks(observe_reductions, Strategy.parse(text).world_size, text)
    return {"strategy": text, "hidden": [min(rank.hidden(share) for rank in ranks) for share in REDUCTION_SHARES]}


def row_of(text: str, bandwidth: float) -> dict:
    """How long the ranks of this strategy wait, all of them together."""
    strategy = Strategy.parse(text)
    serial, overlapped = (run_ranks(observe, strategy.world_size, text, bandwidth, alone) for alone in (True, False))
    waited, still = (sum(rank.waited for rank in ranks) for ranks in (serial, overlapped))
    return {
        "strategy": text,
        "link_busy": waited / sum(sum(rank.computing.values()) for rank in serial),
        "can_be_hidden": sum(can_hide(serial, lowered(strategy, TRAIN))) / waited,
        "hidden": 1 - still / waited,
    }


def table_of(rows: list[dict]) -> Table:
    table = Table(title="All-to-all hidden behind computing", title_justify="left")
    for name in ("strategy", "all-to-all / computing", "can be hidden", "hidden"):
        table.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
    for row in rows:
        table.add_row(row["strategy"], *(f"{row[key]:.1%}" for key in ("link_busy", "can_be_hidden", "hidden")))
    return table


def reduction_table(rows: list[dict]) -> Table:
    table = Table(title="Reductions hidden behind the last backwards, by reductions / computing", title_justify="left")
    table.add_column("strategy", no_wrap=True)
    for share in REDUCTION_SHARES:
        table.add_column(f"{share:.0%}", justify="right")
    for row in rows:
        table.add_row(row["strategy"], *(f"{hidden:.1%}" for hidden in row["hidden"]))
    return table


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    console = Console(width=110)
    console.print(table_of([row_of(text, each) for text in STRATEGIES for each in BANDWIDTHS]))
    console.print(reduction_table([reduction_row(text) for text in REDUCING]))


if __name__ == "__main__":
    main()

"""Overlap changes when things happen and nothing else; and it hides what the timeline says can be hidden.

A rank's clock here counts FLOPs, so that what hides what is exact and the same on any machine.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from tests.distributed.harness import run_ranks
from tests.runtime.tiny import MODELS, TRAIN, batch_for, microbatches

from pipermoe.runtime.counters import FlopCounter
from pipermoe.runtime.groups import ProcessGroups
from pipermoe.runtime.meter import Meter
from pipermoe.runtime.pipeline.emulated_link import EmulatedLink
from pipermoe.runtime.pipeline.engine import Engine
from pipermoe.runtime.pipeline.flight import Collective
from pipermoe.runtime.pipeline.gradients import gradient_of
from pipermoe.schedule.action import Schedule
from pipermoe.schedule.builders import build
from pipermoe.schedule.communication import with_communication
from pipermoe.schedule.durations import Durations
from pipermoe.schedule.timeline import simulate
from pipermoe.specs.strategy import Strategy

pytestmark = pytest.mark.distributed

FLOPS_PER_SECOND = 1e9


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


def schedule_of(strategy: Strategy, *, apart: bool) -> Schedule:
    schedule = build(strategy.schedule, strategy.pipeline_parallel, microbatches(strategy), strategy.virtual_stages)
    lowered = with_communication(schedule)
    if not apart:
        return lowered
    return replace(lowered, ranks=tuple(tuple(lowered.parts(rank)) for rank in range(lowered.num_ranks)))


def run(rank: int, model: str, text: str, bandwidth: float, serial: bool) -> dict:
    """One step over an emulated link; `serial` takes pairs apart and lets weight gradients wait for their turn."""
    strategy = Strategy.parse(text)
    groups, clock = ProcessGroups.create(strategy), FlopClock()
    moe = MODELS[model].moe
    rows = strategy.micro_batch_size * TRAIN.seq_len * moe.top_k // moe.num_experts
    link = EmulatedLink(Collective(groups.ep), groups.ep.rank(), bandwidth, now=clock.now, sleep=clock.sleep)
    engine = Engine(
        MODELS[model],
        TRAIN,
        strategy,
        schedule_of(strategy, apart=serial),
        groups,
        transport=link,
        planned_counts=[[rows] * moe.num_experts] * strategy.expert_parallel,
    )
    clock.meter = engine.meter
    if serial:
        engine.meter.on_release = lambda tensor: None  # as if counted
    with clock:
        result = engine.step(batch_for(strategy, groups.coordinates.dp, 0))
    return {
        "loss": result.loss,
        "gradients": {name: gradient_of(parameter) for name, parameter in engine.named_parameters()},
        "waited": link.waited,
        "stage": groups.coordinates.pp,
        "computing": dict(clock.computing),
        "waiting": dict(clock.waiting),
    }


CASES = {
    "1f1b-overlap": "pp2 dp2 ep2 1f1b-overlap",
    "dualpipe-v": "pp2 vpp2 dp2 ep2 dualpipe-v",
    "interleaved-1f1b-overlap, deduplicated": "pp2 vpp2 dp2 ep2 interleaved-1f1b-overlap deduplicated",
    "zb-v-overlap, recompute": "pp2 vpp2 dp2 ep2 zb-v-overlap full",
    "zb-h2": "pp2 dp2 ep2 zb-h2",
}


@pytest.mark.parametrize("text", CASES.values(), ids=list(CASES))
def test_overlapped_execution_equals_serial_execution_bit_for_bit(text: str):
    serial, overlapped = (run_ranks(run, 4, "sigmoid", text, 1e6, alone) for alone in (True, False))
    for one, other in zip(serial, overlapped, strict=True):
        assert one["loss"].tobytes() == other["loss"].tobytes()
        for name, gradient in one["gradients"].items():
            assert gradient.tobytes() == other["gradients"][name].tobytes(), name
        assert other["waited"] < one["waited"]


def seconds_of(serial: list[dict], schedule: Schedule) -> Durations:
    """What every kind of action took in a serial run; all micro-batches are alike."""

    def of(what: str, kind: str) -> list[float]:
        found = [0.0] * schedule.num_stages
        for rank in serial:
            for stage in schedule.stages_of(rank["stage"]):
                found[stage] = rank[what].get(f"{stage}{kind}1", 0.0)
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


@pytest.mark.parametrize("bandwidth", [5e7, 3e7])
@pytest.mark.parametrize(
    "text",
    [
        CASES["1f1b-overlap"],
        CASES["dualpipe-v"],
        "pp2 dp2 ep2 zb-h1-overlap",
        "pp2 vpp2 dp2 ep2 interleaved-1f1b-overlap",
    ],
)
def test_nine_tenths_of_the_all_to_all_that_the_timeline_says_can_be_hidden_are(text: str, bandwidth: float):
    """The link is busy for a third of the time that ranks compute, or for more than half of it."""
    serial, overlapped = (run_ranks(run, 4, "plain", text, bandwidth, alone) for alone in (True, False))
    schedule = schedule_of(Strategy.parse(text), apart=False)
    exposed = simulate(schedule, seconds_of(serial, schedule)).exchange_seconds
    for one, other in zip(serial, overlapped, strict=True):
        assert one["waited"] > 0.25 * sum(one["computing"].values())
        can_be_hidden = one["waited"] - exposed[one["stage"]]
        assert can_be_hidden > 0
        assert one["waited"] - other["waited"] >= 0.9 * can_be_hidden

"""Overlap changes when things happen and nothing else; and it hides what the timeline says can be hidden.

A rank's clock here counts FLOPs, so that what hides what is exact and the same on any machine.
"""

from __future__ import annotations

import pytest
from benchmarks.overlap import can_hide, lowered, step_over_link
from tests.distributed.harness import run_ranks
from tests.runtime.tiny import MODELS, TRAIN, batch_for, reduced_gradients

from pipermoe.specs.strategy import Strategy

pytestmark = pytest.mark.distributed


def run(rank: int, model: str, text: str, bandwidth: float, serial: bool) -> dict:
    strategy = Strategy.parse(text)
    batch = batch_for(strategy, rank % strategy.data_parallel, 0)
    engine, loss, observed = step_over_link(MODELS[model], TRAIN, strategy, bandwidth, batch, serial=serial)
    return {"loss": loss, "gradients": reduced_gradients(engine), "observed": observed}


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
        assert other["observed"].waited < one["observed"].waited


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
    serial, overlapped = (
        [rank["observed"] for rank in run_ranks(run, 4, "plain", text, bandwidth, alone)] for alone in (True, False)
    )
    hideable = can_hide(serial, lowered(Strategy.parse(text), TRAIN))
    for one, other, can_be_hidden in zip(serial, overlapped, hideable, strict=True):
        assert one.waited > 0.25 * sum(one.computing.values())
        assert can_be_hidden > 0
        assert one.waited - other.waited >= 0.9 * can_be_hidden

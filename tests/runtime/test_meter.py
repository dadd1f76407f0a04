"""Seconds by term, and the trace: what is timed is exclusive, and what waits leaves a gap."""

from __future__ import annotations

from pipermoe.runtime.meter import Meter
from pipermoe.runtime.trace import ALL_TO_ALL, COMPUTE, Trace, spans_of
from pipermoe.schedule.action import Action, Kind


def test_nested_terms_are_exclusive_and_an_action_inside_a_term_ends_its_stretch():
    meter = Meter()
    meter.trace = Trace(rank=3)
    meter.action = Action(Kind.FORWARD, 0, 3)
    with meter.term("forward"):
        landed = meter.launched(ALL_TO_ALL)
        with meter.term("all_to_all"):
            landed()
        meter.action = Action(Kind.BACKWARD, 0, 1)
    spans = meter.trace.spans
    assert [(span.lane, span.name) for span in spans] == [
        (COMPUTE, "0F3"),
        (ALL_TO_ALL, "0F3"),
        (COMPUTE, "0F3"),
        (COMPUTE, "0B1"),
    ]
    assert spans[0].end <= spans[2].start
    assert spans[2].end == spans[3].start
    stretches = sum(span.end - span.start for span in spans if span.lane == COMPUTE)
    assert abs(stretches - meter.seconds["forward"]) < 1e-5
    assert meter.seconds["all_to_all"] > 0
    assert spans_of(3, meter.trace.to_json()) == spans


def test_whoever_watches_is_told_of_every_action_and_every_wait():
    meter, seen = Meter(), []
    meter.on_change = lambda *change: seen.append(change)
    meter.action = "update"
    with meter.term("forward"), meter.term("all_to_all"):
        pass
    assert seen == [("update", False), ("update", True), ("update", False)]
    assert meter.action == "update"

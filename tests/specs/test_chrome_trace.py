"""Lanes of a Chrome trace: what overlaps is set side by side, so that no row shows two things at once."""

from __future__ import annotations

import json

from pipermoe.specs.chrome_trace import Sample, Span, write_chrome_trace


def test_overlapping_spans_of_a_lane_get_rows_of_their_own(tmp_path):
    spans = [
        Span(0, "compute", "0F0", 10.0, 11.0),
        Span(0, "point-to-point", "0SEND_F0", 11.0, 13.0),
        Span(0, "point-to-point", "0SEND_F1", 12.0, 14.0),
        Span(0, "point-to-point", "0SEND_F2", 13.0, 15.0),
        Span(1, "compute", "1F0", 13.0, 14.0),
    ]
    write_chrome_trace(tmp_path / "trace.json", spans, [Sample(0, "held", 10.5, 2.0)])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {
        (0, 0): "compute",
        (0, 1): "point-to-point",
        (0, 2): "point-to-point 2",
        (1, 0): "compute",
    }
    rows = [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert rows == [
        (0, 0, "0F0", 0.0, 1e6),
        (0, 1, "0SEND_F0", 1e6, 2e6),
        (0, 1, "0SEND_F2", 3e6, 2e6),
        (0, 2, "0SEND_F1", 2e6, 2e6),
        (1, 0, "1F0", 3e6, 1e6),
    ]
    assert [(e["ts"], e["args"]) for e in events if e["ph"] == "C"] == [(5e5, {"held": 2.0})]

"""What people see of a schedule: the table of the papers, a drawing, a trace."""

import json
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from pipermoe.report.picture import Box, Label
from pipermoe.report.schedule import ScheduleSummary, draw, picture_of, render_table, summary, write_trace
from pipermoe.schedule.builders import RECIPES, build
from pipermoe.schedule.communication import with_communication
from pipermoe.schedule.timeline import simulate
from pipermoe.specs.errors import UserError


def test_the_table_shows_time_from_left_to_right():
    assert render_table(build("1f1b", 2, 3)) == (
        "rank 0  F0 F1 .  .  B0    F2 B1    .  B2\n"
        "rank 1  .  F0 B0    F1 B1    F2 B2    .  .\n"
        "\n"
        "rank  stages       bubble   activations\n"
        "0     0            25.0 %             2\n"
        "1     1            25.0 %             1\n"
        "step: 12 unit steps (F = I = W = 1, B = 2); activations: peak, each of one micro-batch\n"
    )


def test_the_table_is_the_same_with_sends_and_receives():
    schedule = build("dualpipe", 4, 8)
    assert render_table(with_communication(schedule)) == render_table(schedule)
    assert "0F6&3B3" in render_table(schedule)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("name", RECIPES)
def test_the_table_keeps_to_its_width(name, width):
    table = render_table(build(name, 4, 8, RECIPES[name].virtual_stages[0]), width)
    grid = table.split("rank  stages")[0]
    assert max(map(len, grid.splitlines())) <= width
    assert grid.count("rank 3") > 1 or width == 120


@pytest.mark.parametrize("name", RECIPES)
def test_the_drawing_has_a_box_for_every_action_at_its_time(name):
    timeline = simulate(build(name, 4, 8, RECIPES[name].virtual_stages[0]))
    boxes = [shape for shape in picture_of(timeline).shapes if isinstance(shape, Box) and shape.tip]
    assert len(boxes) == sum(len(list(timeline.schedule.parts(rank))) for rank in range(4))
    first = min(boxes, key=lambda box: box.x)
    scale = first.width / (timeline.end[0][0] - timeline.start[0][0])
    assert max(box.x + box.width for box in boxes) - first.x == pytest.approx(timeline.step_seconds * scale)


def test_the_drawing_is_well_formed_and_escapes_its_title(tmp_path):
    draw(simulate(build("zb-v", 2, 4, 2)), tmp_path / "zb.svg", title="F < B & W")
    root = ElementTree.parse(tmp_path / "zb.svg").getroot()
    assert "F < B & W" in [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"bubble", "activations", "rank 0", "rank 1", "weight gradient"} <= {
        element.text for element in root.iter("{http://www.w3.org/2000/svg}text")
    }


def test_numbers_that_do_not_fit_are_left_out():
    shapes = picture_of(simulate(build("1f1b", 2, 500))).shapes
    numbers = [shape for shape in shapes if isinstance(shape, Label) and shape.y < 120 and shape.text == "250"]
    assert numbers == []


def test_png_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"PNG needs matplotlib: pip install 'pipermoe\[plots\]', or write .svg"):
        draw(simulate(build("gpipe", 1, 1)), tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # needs matplotlib
def test_a_png_has_the_size_of_the_drawing(tmp_path):
    pytest.importorskip("matplotlib")
    timeline = simulate(build("dualpipe", 4, 8))
    draw(timeline, tmp_path / "x.png")
    header = (tmp_path / "x.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") == int(2 * picture_of(timeline).width)


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"must end in .svg or .png"):
        draw(simulate(build("gpipe", 1, 1)), tmp_path / "x.pdf")


def test_the_summary_of_a_schedule_is_a_document_that_reads_back():
    document = summary(simulate(build("zb-h1", 2, 3)))
    assert document.actions[1] == ("1F0", "1I0", "1F1", "1I1", "1W0", "1F2", "1I2", "1W1", "1W2")
    assert (document.step, document.bubble_fraction, document.activations_in_flight) == (10.0, (0.1, 0.1), (2, 2))
    assert ScheduleSummary.model_validate_json(document.model_dump_json()) == document


def test_the_trace_holds_every_action_in_microseconds(tmp_path):
    timeline = simulate(build("dualpipe-v", 2, 4, 2))
    write_trace(timeline, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    actions = [event for event in events if event["ph"] == "X"]
    assert len(actions) == sum(len(list(timeline.schedule.parts(rank))) for rank in range(2))
    assert max(event["ts"] + event["dur"] for event in actions) == timeline.step_seconds * 1e6
    counters = [event["args"]["activations in flight"] for event in events if event["ph"] == "C" and event["pid"] == 0]
    assert (max(counters), counters[-1]) == (5, 0)
    assert {event["tid"] for event in actions} == {0, 1}  # the backward of a pair has its own lane

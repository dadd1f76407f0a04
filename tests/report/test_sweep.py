"""Sweeps as tables of 100 columns and as pictures whose marks lie where the numbers say."""

import io
import re

import pytest
from rich.console import Console
from tests.resources.cases import MODEL, TRAIN, machine

from pipermoe.planner.sweep import sweep
from pipermoe.report.chart import Titles, bar_chart, line_chart, nice_ceiling
from pipermoe.report.picture import Box, Line, to_svg
from pipermoe.report.sweep import render_sweep, sweep_picture


def test_a_sweep_is_a_table_and_a_picture():
    result = sweep(MODEL, machine(), TRAIN, {"ranks": [1, 2, 4, 7]})
    stream = io.StringIO()
    render_sweep(result, Console(file=stream, width=100))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("mbs") == 3
    marks = [shape for shape in sweep_picture(result).shapes if isinstance(shape, Box)]
    assert len(marks) == 3 + 1  # and the legend


def test_marks_lie_where_the_numbers_say():
    picture = line_chart({"a": [(1, 0.0), (2, 5.0), (4, 10.0)]}, Titles("t", "x", "y"))
    [line] = [shape for shape in picture.shapes if isinstance(shape, Line) and len(shape.points) == 3]
    (x0, y0), (x1, y1), (x2, y2) = line.points
    assert x1 - x0 == pytest.approx((x2 - x0) / 3)  # linear up to a factor of 4
    assert y0 - y1 == pytest.approx((y0 - y2) / 2)
    wide = line_chart({"a": [(1, 1.0), (4, 1.0), (16, 1.0)]}, Titles("t", "x", "y"))
    [line] = [shape for shape in wide.shapes if isinstance(shape, Line) and len(shape.points) == 3]
    assert line.points[1][0] - line.points[0][0] == pytest.approx(line.points[2][0] - line.points[1][0])


def test_bars_are_as_long_as_their_values():
    picture = bar_chart({"a": 1.0, "b": 4.0}, Titles("t", "x", ""))
    bars = [shape for shape in picture.shapes if isinstance(shape, Box)]
    assert bars[1].width == pytest.approx(4 * bars[0].width)
    assert re.findall(r"<title>(\w)</title>", to_svg(picture)) == ["a", "b"]


def test_axes_end_on_round_numbers():
    assert [nice_ceiling(value) for value in (0.7, 1.0, 2.1, 26, 9_000)] == [1, 1, 2.5, 50, 10_000]

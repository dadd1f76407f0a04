"""Charts as flat pictures: lines over a number, or a bar for each name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipermoe.report.picture import Box, Label, Line, Picture, Shape

COLOURS = ("#1f5fa8", "#d1651a", "#3a8f4d", "#8a4fa3", "#b03a48", "#6b6b6b")
GRID, INK = "#dddddd", "#222222"
WIDTH, HEIGHT = 640.0, 400.0
LEFT, RIGHT, TOP, BOTTOM = 76.0, 150.0, 64.0, 56.0

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Titles:
    chart: str
    x: str
    y: str


def line_chart(series: Mapping[str, Points], titles: Titles) -> Picture:
    """A line with markers for every series. y begins at 0; x is logarithmic where it spans more than a factor of 4."""
    xs = sorted({x for points in series.values() for x, _ in points})
    top = nice_ceiling(max(y for points in series.values() for _, y in points))
    logarithmic = xs[0] > 0 and xs[-1] > 4 * xs[0]
    low, high = (math.log(xs[0]), math.log(xs[-1])) if logarithmic else (xs[0], xs[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        along = ((math.log(x) if logarithmic else x) - low) / (high - low or 1.0)
        return LEFT + along * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    shapes: list[Shape] = [*_frame(titles, top), *_x_ticks(xs, place)]
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        placed = [place(*point) for point in sorted(points)]
        shapes.append(Line(tuple(placed), colour))
        shapes += [Box(x - 3, y - 3, 6, 6, colour, tip=name) for x, y in placed]
        height = TOP + 8 + 18 * index
        shapes.append(Box(WIDTH - RIGHT + 16, height - 4, 10, 8, colour))
        shapes.append(Label(WIDTH - RIGHT + 32, height, name, 11, anchor="start"))
    return Picture(WIDTH, HEIGHT, shapes)


def bar_chart(values: Mapping[str, float], titles: Titles) -> Picture:
    """A bar for every name, from the left, with its number."""
    row, left = 26.0, 30 + 6.5 * max(map(len, values))
    height, longest = 70 + row * len(values), max(values.values()) or 1.0
    shapes: list[Shape] = [Label(14, 22, titles.chart, 14, anchor="start", bold=True)]
    for index, (name, value) in enumerate(values.items()):
        y = 48 + row * index
        length = value / longest * (WIDTH - left - 90)
        shapes.append(Label(left - 8, y + 8, name, 11, anchor="end"))
        shapes.append(Box(left, y, length, 16, COLOURS[0], tip=name))
        shapes.append(Label(left + length + 6, y + 8, f"{value:,.0f}" if value else "none", 11, anchor="start"))
    shapes.append(Label(left, height - 12, titles.x, 11, anchor="start"))
    return Picture(WIDTH, height, shapes)


def nice_ceiling(value: float) -> float:
    """The next number of 1, 2, 2.5, 5 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-12))


def _frame(titles: Titles, top: float) -> Iterator[Shape]:
    yield Label(14, 22, titles.chart, 14, anchor="start", bold=True)
    for step in range(6):
        y = HEIGHT - BOTTOM - step / 5 * (HEIGHT - TOP - BOTTOM)
        yield Line(((LEFT, y), (WIDTH - RIGHT, y)), GRID, 1.0)
        yield Label(LEFT - 8, y, _number(top * step / 5), 11, anchor="end")
    yield Label(LEFT, HEIGHT - 12, titles.x, 11, anchor="start")
    yield Label(14, TOP - 18, titles.y, 11, anchor="start")


def _x_ticks(xs: Sequence[float], place) -> Iterator[Shape]:
    last = -math.inf
    for x in xs:
        at, bottom = place(x, 0.0)
        yield Line(((at, bottom), (at, bottom + 4)), INK, 1.0)
        if at - last > 44:  # no label on top of another
            yield Label(at, bottom + 14, _number(x), 11)
            last = at


def _number(value: float) -> str:
    return f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"

"""A flat picture of rectangles, lines and labels, written as SVG by hand or as PNG through matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pipermoe.specs.documents import require_writable, write_atomically
from pipermoe.specs.errors import UserError, describe_value

FONT = "Helvetica, Arial, sans-serif"


@dataclass(frozen=True, slots=True)
class Box:
    """A filled rectangle; lengths in points, the origin is the upper left corner."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    edge: str | None = None
    tip: str = ""  # shown by browsers when the pointer rests on the box


@dataclass(frozen=True, slots=True)
class Label:
    """Text whose anchor is at (x, y), vertically centred."""

    x: float
    y: float
    text: str
    size: float
    fill: str = "#222222"
    anchor: Literal["start", "middle", "end"] = "middle"
    bold: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """Straight pieces from point to point."""

    points: tuple[tuple[float, float], ...]
    stroke: str
    width: float = 2.0


Shape = Box | Label | Line


@dataclass(frozen=True, slots=True)
class Picture:
    width: float
    height: float
    shapes: Sequence[Shape]


def write_picture(picture: Picture, path: Path) -> None:
    """Write as SVG or PNG by suffix; UserError for what `require_drawable` refuses."""
    require_drawable(path)
    if path.suffix == ".svg":
        write_atomically(path, to_svg(picture))
    else:
        _write_png(picture, path)


def require_drawable(path: Path) -> None:
    """UserError for a suffix but .svg and .png, PNG without matplotlib, or where nothing can be written."""
    if path.suffix not in (".svg", ".png"):
        raise UserError(describe_value("", "--plot", str(path), "must end in .svg or .png"))
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        rule = "PNG needs matplotlib: pip install 'pipermoe[plots]', or write .svg, which needs nothing"
        raise UserError(describe_value("", "--plot", str(path), rule))
    require_writable(path)


def to_svg(picture: Picture) -> str:
    size = f'width="{picture.width:g}" height="{picture.height:g}" viewBox="0 0 {picture.width:g} {picture.height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}">'
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return "\n".join([head, ground, *_svg_shapes(picture.shapes), "</svg>"]) + "\n"


def _svg_shapes(shapes: Sequence[Shape]) -> Iterator[str]:
    for shape in shapes:
        if isinstance(shape, Line):
            points = " ".join(f"{x:.2f},{y:.2f}" for x, y in shape.points)
            yield f'<polyline points="{points}" fill="none" stroke="{shape.stroke}" stroke-width="{shape.width:g}"/>'
            continue
        if isinstance(shape, Box):
            edge = f' stroke="{shape.edge}" stroke-width="0.6"' if shape.edge else ""
            place = f'x="{shape.x:.2f}" y="{shape.y:.2f}" width="{shape.width:.2f}" height="{shape.height:.2f}"'
            tip = f"<title>{escape(shape.tip)}</title>" if shape.tip else ""
            yield (
                f'<rect {place} fill="{shape.fill}"{edge}>{tip}</rect>'
                if tip
                else (f'<rect {place} fill="{shape.fill}"{edge}/>')
            )
        else:
            weight = ' font-weight="bold"' if shape.bold else ""
            style = f'font-size="{shape.size:g}" fill="{shape.fill}" text-anchor="{shape.anchor}"{weight}'
            # The baseline is shifted by hand: dominant-baseline is not honoured by every renderer.
            y = shape.y + 0.36 * shape.size
            yield f'<text x="{shape.x:.2f}" y="{y:.2f}" {style} pointer-events="none">{escape(shape.text)}</text>'


def _write_png(picture: Picture, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    from matplotlib.patches import Rectangle  # pyright: ignore[reportMissingImports]

    points_per_inch = 72
    figure = Figure(figsize=(picture.width / points_per_inch, picture.height / points_per_inch), dpi=144)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, picture.width)
    axes.set_ylim(picture.height, 0)
    axes.axis("off")
    for shape in picture.shapes:
        if isinstance(shape, Box):
            corner, edge = (shape.x, shape.y), shape.edge or "none"
            axes.add_patch(Rectangle(corner, shape.width, shape.height, fc=shape.fill, ec=edge, lw=0.6))
        elif isinstance(shape, Line):
            axes.plot(*zip(*shape.points, strict=True), color=shape.stroke, lw=shape.width)
        else:
            place = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
            style = {"fontsize": shape.size, "color": shape.fill, "fontweight": "bold" if shape.bold else "normal"}
            axes.text(shape.x, shape.y, shape.text, ha=place, va="center_baseline", **style)
    image = io.BytesIO()
    figure.savefig(image, format="png", facecolor="white")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None

"""A schedule for people: the table that papers print, the picture that they draw, and a trace for Perfetto."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from pipermoe.report.picture import Box, Label, Picture, write_picture
from pipermoe.schedule.action import COMPUTE, Action, Kind, Schedule
from pipermoe.schedule.communication import without_communication
from pipermoe.schedule.memory import in_flight
from pipermoe.schedule.timeline import Timeline, simulate
from pipermoe.specs.base import Frozen
from pipermoe.specs.chrome_trace import Sample, Span, write_chrome_trace

# Distinct in grey and for colour-blind readers. One shade per model chunk of a rank, the last for all further ones.
_BACKWARDS = ("#2e8b57", "#9fd4b5", "#d5ecde")
PALETTE = {
    Kind.FORWARD: ("#2f6db3", "#94c0ea", "#d0e3f6"),
    Kind.BACKWARD: _BACKWARDS,
    Kind.INPUT_GRAD: _BACKWARDS,
    Kind.WEIGHT_GRAD: ("#c77c02", "#f5cd74", "#fcebc4"),
}
NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT_GRAD: "input gradient",
    Kind.WEIGHT_GRAD: "weight gradient",
}
INK, FAINT, IDLE, EDGE = "#222222", "#666666", "#ececec", "#ffffff"
LEFT, RIGHT, TOP, ROW, GAP, BOTTOM, CHART = 58.0, 136.0, 62.0, 26.0, 4.0, 42.0, 820.0
TEXT, SMALLEST_TEXT = 10.0, 6.0


class ScheduleSummary(Frozen):
    """A schedule and what it costs, for programs; `step` in the timeline's unit.

    `actions` has one list per pipeline rank; the other lists have one entry per rank. `activations_in_flight` counts
    stages and micro-batches.
    """

    name: str
    microbatches: int
    stage_rank: tuple[int, ...]
    mirror_rank: tuple[int, ...]
    actions: tuple[tuple[str, ...], ...]
    step: float
    bubble_fraction: tuple[float, ...]
    activations_in_flight: tuple[int, ...]


def summary(timeline: Timeline) -> ScheduleSummary:
    """What `render_table` shows, as a document."""
    schedule = timeline.schedule
    return ScheduleSummary(
        name=schedule.name,
        microbatches=schedule.microbatches,
        stage_rank=schedule.stage_rank,
        mirror_rank=schedule.mirror_rank,
        actions=tuple(tuple(map(str, actions)) for actions in schedule.ranks),
        step=timeline.step_seconds,
        bubble_fraction=timeline.bubble_fraction,
        activations_in_flight=in_flight(schedule).rank,
    )


def render_table(schedule: Schedule, width: int | None = None) -> str:
    """The schedule on a grid of unit steps, one line per rank, and below it bubble and activations per rank.

    F, I and W take one step, B two, a pair as long as both. A cell reads `F3` (micro-batch 3), or `2F3` (on stage 2)
    where a rank holds several stages; `F4&B1` is an overlapped pair, `.` is idle. Lines longer than `width` characters
    continue in further blocks.
    """
    timeline = simulate(without_communication(schedule))
    rows, step = _grid(timeline)
    columns = len(rows[0]) if width is None else max((width - 8) // step, 1) * step
    lines = []
    for first in range(0, len(rows[0]), columns):
        lines += [f"rank {rank:<3}{row[first : first + columns].rstrip()}" for rank, row in enumerate(rows)] + [""]
    return "\n".join([*lines, *_summary(timeline)]) + "\n"


def _grid(timeline: Timeline) -> tuple[list[str], int]:
    """One string per rank, all of equal length, and the characters per unit step."""
    cells = [
        [
            (_cell(timeline.schedule, action), round(start), round(end))
            for action, start, end in _computed(timeline, rank)
        ]
        for rank in range(timeline.schedule.num_ranks)
    ]
    step = max(math.ceil((len(text) + 1) / (end - start)) for row in cells for text, start, end in row)
    rows = []
    for row in cells:
        line, now = "", 0
        for text, start, end in row:
            line += ".".ljust(step) * (start - now) + text.ljust((end - start) * step)
            now = end
        rows.append(line + ".".ljust(step) * (round(timeline.step_seconds) - now))
    return rows, step


def _cell(schedule: Schedule, action: Action) -> str:
    single = schedule.num_stages == schedule.num_ranks and not schedule.mirror_rank
    return "&".join(f"{'' if single else part.stage}{part.kind}{part.microbatch}" for part in action.parts)


def _computed(timeline: Timeline, rank: int) -> Iterator[tuple[Action, float, float]]:
    """The compute actions of a rank with start and end."""
    rows = zip(timeline.schedule.ranks[rank], timeline.start[rank], timeline.end[rank], strict=True)
    return (row for row in rows if row[0].kind in COMPUTE)


def _summary(timeline: Timeline) -> Iterator[str]:
    schedule = timeline.schedule
    peaks = in_flight(schedule).rank
    yield f"{'rank':<6}{'stages':<12}{'bubble':>7}{'activations':>14}"
    for rank, bubble in enumerate(timeline.bubble_fraction):
        stages = ",".join(map(str, schedule.stages_of(rank)))
        yield f"{rank:<6}{stages:<12}{_percent(bubble):>7}{peaks[rank]:>14}"
    unit = "one stage and micro-batch" if len(schedule.stages_of(0)) > 1 else "one micro-batch"
    yield f"step: {timeline.step_seconds:g} unit steps (F = I = W = 1, B = 2); activations: peak, each of {unit}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def draw(timeline: Timeline, path: Path, title: str = "") -> None:
    """Draw the timeline as SVG or PNG (by suffix of `path`): ranks from top to bottom, time from left to right.

    Boxes carry micro-batch numbers; a lighter shade is a later model chunk, or the second copy in DualPipe. The halves
    of a box divided horizontally are an overlapped pair.
    """
    write_picture(picture_of(timeline, title), path)


def picture_of(timeline: Timeline, title: str = "") -> Picture:
    """The drawing as shapes; lengths in points."""
    ranks = timeline.schedule.num_ranks
    scale = CHART / timeline.step_seconds
    height = TOP + ranks * (ROW + GAP) + BOTTOM
    heading = title or f"{timeline.schedule.name}: {ranks} ranks, {timeline.schedule.microbatches} micro-batches"
    shapes: list[Box | Label] = [Label(LEFT, 18, heading, 14, INK, "start", bold=True)]
    shapes += _legend(timeline.schedule)
    peaks = in_flight(timeline.schedule).rank
    shapes.append(Label(LEFT + CHART + 38, TOP - 10, "bubble", TEXT, FAINT))
    shapes.append(Label(LEFT + CHART + 94, TOP - 10, "activations", TEXT, FAINT))
    for rank in range(ranks):
        y = TOP + rank * (ROW + GAP)
        shapes.append(Label(LEFT - 8, y + ROW / 2, f"rank {rank}", TEXT + 1, INK, "end"))
        shapes.append(Box(LEFT, y, CHART, ROW, IDLE))
        for action, start, end in _computed(timeline, rank):
            shapes += _boxes(timeline.schedule, action, rank, LEFT + start * scale, y, (end - start) * scale)
        shapes.append(Label(LEFT + CHART + 38, y + ROW / 2, _percent(timeline.bubble_fraction[rank]), TEXT + 1))
        shapes.append(Label(LEFT + CHART + 94, y + ROW / 2, str(peaks[rank]), TEXT + 1))
    shapes += _time_axis(timeline.step_seconds, scale, TOP + ranks * (ROW + GAP))
    return Picture(LEFT + CHART + RIGHT, height, shapes)


def _boxes(schedule: Schedule, action: Action, rank: int, x: float, y: float, width: float) -> Iterator[Box | Label]:
    height = ROW / len(action.parts)
    for i, part in enumerate(action.parts):
        shade = _shade(schedule, part, rank)
        fill = PALETTE[part.kind][shade]
        tip = f"{NAMES[part.kind]}, stage {part.stage}, micro-batch {part.microbatch}"
        yield Box(x, y + i * height, width, height, fill, EDGE, tip)
        text = str(part.microbatch)
        size = min(TEXT, 0.85 * height, 0.9 * width / (0.64 * len(text)))  # digits are at most 0.64 as wide as high
        if size >= SMALLEST_TEXT:
            yield Label(x + width / 2, y + (i + 0.5) * height, text, size, INK if shade else "#ffffff")


def _shade(schedule: Schedule, part: Action, rank: int) -> int:
    """Which of a rank's model chunks a part belongs to, or which copy of a stage."""
    chunk = part.microbatch % 2 if schedule.mirror_rank else schedule.stages_of(rank).index(part.stage)
    return min(chunk, len(PALETTE[Kind.FORWARD]) - 1)


def _legend(schedule: Schedule) -> Iterator[Box | Label]:
    parts = [(part, rank) for rank in range(schedule.num_ranks) for part in schedule.parts(rank)]
    used = {part.kind for part, _ in parts}
    shades = sorted({_shade(schedule, part, rank) for part, rank in parts if part.kind is Kind.FORWARD})
    x, y = LEFT, 40.0
    names = dict(NAMES)
    if Kind.BACKWARD in used and Kind.INPUT_GRAD in used:
        names[Kind.BACKWARD] = "backward, input gradient"
    shown = [kind for kind in NAMES if kind in used and not (kind is Kind.INPUT_GRAD and Kind.BACKWARD in used)]
    for kind in shown:
        for shade in shades:
            yield Box(x, y - 6, 12, 12, PALETTE[kind][shade], EDGE)
            x += 13
        yield Label(x + 4, y, names[kind], TEXT, INK, "start")
        x += 5.4 * len(names[kind]) + 22
    yield Box(x, y - 6, 12, 12, IDLE, EDGE)
    yield Label(x + 17, y, "idle", TEXT, INK, "start")
    if len(shades) > 1:
        text = "shades: the two copies of a stage" if schedule.mirror_rank else "shades: model chunks, first is darkest"
        yield Label(x + 54, y, text, TEXT, FAINT, "start")


def _time_axis(end: float, scale: float, y: float) -> Iterator[Box | Label]:
    tick = _round_tick(end / 8)
    for i in range(int(end / tick + 1e-9) + 1):
        x = LEFT + i * tick * scale
        yield Box(x - 0.4, y, 0.8, 5, FAINT)
        yield Label(x, y + 13, f"{i * tick:g}", TEXT - 1, FAINT)
    yield Label(LEFT + CHART / 2, y + 29, "time", TEXT, FAINT)


def _round_tick(least: float) -> float:
    """The smallest of 1, 2, 5, 10, ... (any power of ten) that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def write_trace(timeline: Timeline, path: Path) -> None:
    """Write the timeline as a Chrome trace (chrome://tracing, ui.perfetto.dev), times in seconds of the timeline."""
    write_chrome_trace(path, _spans(timeline), _activations_held(timeline))


def _spans(timeline: Timeline) -> Iterator[Span]:
    for rank in range(timeline.schedule.num_ranks):
        rows = zip(timeline.schedule.ranks[rank], timeline.start[rank], timeline.end[rank], strict=True)
        for action, start, end in rows:
            for part in action.parts:
                details = {"stage": part.stage, "microbatch": part.microbatch}
                yield Span(rank, "compute", str(part), start, end, NAMES.get(part.kind, "communication"), details)


def _activations_held(timeline: Timeline) -> Iterator[Sample]:
    for rank in range(timeline.schedule.num_ranks):
        for time, held in timeline.memory(rank, [1.0] * timeline.schedule.num_stages):
            yield Sample(rank, "activations in flight", time, held)

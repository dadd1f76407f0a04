"""Bars and status lines on stderr while a person watches; nothing where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)

SHOW_CURSOR = "\33[?25h"


class _OfKnownTotal(ProgressColumn):
    """A column of activities whose total is known, blank for others."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        return "" if task.total is None else self._column(task)


class Display:
    """What a process shows of its work: nested activities, a line each. No thread: it draws when something changes."""

    def __init__(self, *, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._progress: Progress | None = None
        if shown and console.is_terminal and not console.is_dumb_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                *map(_OfKnownTotal, (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())),
                console=console,
                transient=True,
                auto_refresh=False,
                # stdout passes through only where it is the terminal too: a redirected one stays untouched.
                redirect_stdout=sys.stdout.isatty(),
            )

    @contextmanager
    def activity(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show `title` during the block; the function given tells how much of `total` is done."""
        progress = self._progress
        if progress is None:
            yield lambda done: None
            return
        outermost = not progress.live.is_started
        if outermost:
            progress.start()
        task = progress.add_task(title, total=total, visible=True)
        progress.refresh()
        try:
            yield lambda done: progress.update(task, completed=done, refresh=True)
        finally:
            progress.remove_task(task)
            if outermost:
                progress.stop()
            else:
                progress.refresh()


def show_cursor() -> None:
    """Bring back the cursor that the bar of a killed process had hidden."""
    if sys.stderr.isatty():
        sys.stderr.write(SHOW_CURSOR)
        sys.stderr.flush()
